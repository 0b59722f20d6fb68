"""Reports: one self-contained HTML page per run and per comparison, a CSV, and pictures of mixed samples."""

from hardmix.report.gallery import caption, mixed_sheet
from hardmix.report.page import write_comparison_report, write_run_report
from hardmix.report.spreadsheet import write_csv

__all__ = ["caption", "mixed_sheet", "write_comparison_report", "write_csv", "write_run_report"]
