"""One self-contained page per run and per comparison: no script, no outside resource, every name escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

import hardmix
from hardmix.report.comparison import read_comparison
from hardmix.report.folder import read_run
from hardmix.report.text import MAX_TEXT, visible
from hardmix.train.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment


def write_run_report(run: Path) -> Path:
    """Write `run`/report.html from what the run folder holds, and return its path.

    A run that has not finished, or a folder with missing or damaged pieces, gets a page that says what it lacks.

    Raises:
        ValueError: `run` is not a folder.
    """
    from hardmix.report.run_page import run_context

    run = Path(run)
    return _write("run.html.j2", run_context(read_run(run)), run / "report.html")


def write_comparison_report(folder: Path) -> Path:
    """Write `folder`/report.html from its comparison.json and the run folders inside it, and return its path.

    Runs that lost are shown like the others; runs whose folder is missing appear with the numbers of comparison.json.

    Raises:
        ValueError: there is no readable comparison.json.
    """
    from hardmix.report.comparison_page import comparison_context

    folder = Path(folder)
    return _write("comparison.html.j2", comparison_context(read_comparison(folder)), folder / "report.html")


def _write(template: str, context: dict[str, Any], path: Path) -> Path:
    write_text(path, render(template, context))
    return path


def render(template: str, context: dict[str, Any]) -> str:
    """The page as text. Everything that is not markup of our own is made visible, cut to length and escaped."""
    from hardmix.report.plots import COLORS

    page = _environment().get_template(template)
    return page.render(colors=COLORS, hardmix_version=hardmix.__version__, **context)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hardmix.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["file"] = lambda text: Markup(escape(visible(text, MAX_TEXT, keep="\n\t")))
    environment.filters["long"] = lambda text: Markup(escape(visible(text, 2000)))
    return environment


def _harmless(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    return "n/a" if value is None else visible(value)
