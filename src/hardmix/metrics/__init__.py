"""What torchmetrics lacks: hard mixed samples, calibration, robustness, and statistics over seeds."""

from hardmix.metrics.alignment import alignment_metrics, embedding_shift, modality_gap, relative_alignment, uniformity
from hardmix.metrics.calibration import adaptive_calibration_error, calibration_metrics, fit_temperature
from hardmix.metrics.classification import classification_metrics, mixed_accuracy, mixed_metrics, reliability
from hardmix.metrics.corruptions import corrupt
from hardmix.metrics.label_errors import ShotBins, error_by_label, principal_components, shot_bins, shot_errors
from hardmix.metrics.regression import local_linearity, ordinality, regression_metrics, shot_metrics
from hardmix.metrics.retrieval import retrieval_metrics, retrieval_ranks
from hardmix.metrics.robustness import (
    corruption_accuracy,
    fgsm_accuracy,
    mixed_accuracy_curve,
    occlusion_accuracy,
)
from hardmix.metrics.statistics import Interval, PairedTest, holm, mean_interval, paired_test

__all__ = [
    "Interval",
    "PairedTest",
    "ShotBins",
    "adaptive_calibration_error",
    "alignment_metrics",
    "calibration_metrics",
    "classification_metrics",
    "corrupt",
    "corruption_accuracy",
    "embedding_shift",
    "error_by_label",
    "fgsm_accuracy",
    "fit_temperature",
    "holm",
    "local_linearity",
    "mean_interval",
    "mixed_accuracy",
    "mixed_accuracy_curve",
    "mixed_metrics",
    "modality_gap",
    "occlusion_accuracy",
    "ordinality",
    "paired_test",
    "principal_components",
    "regression_metrics",
    "relative_alignment",
    "reliability",
    "retrieval_metrics",
    "retrieval_ranks",
    "shot_bins",
    "shot_errors",
    "shot_metrics",
    "uniformity",
]
