"""What torchmetrics lacks: hard mixed samples, calibration, robustness, and statistics over seeds."""

from hardmix.metrics.alignment import alignment_metrics, embedding_shift, modality_gap, relative_alignment, uniformity
from hardmix.metrics.arithmetic import arithmetic_metrics, arithmetic_queries, choose_scale
from hardmix.metrics.calibration import adaptive_calibration_error, calibration_metrics, fit_temperature
from hardmix.metrics.captions import caption_metrics, cider_scores
from hardmix.metrics.classification import classification_metrics, mixed_accuracy, mixed_metrics, reliability
from hardmix.metrics.corruptions import corrupt
from hardmix.metrics.label_errors import ShotBins, error_by_label, principal_components, shot_bins, shot_errors
from hardmix.metrics.pair_calibration import fit_query_temperature, query_calibration, retrieval_calibration
from hardmix.metrics.regression import local_linearity, ordinality, regression_metrics, shot_metrics
from hardmix.metrics.retrieval import retrieval_metrics, retrieval_ranks
from hardmix.metrics.robustness import (
    corruption_accuracy,
    fgsm_accuracy,
    mixed_accuracy_curve,
    occlusion_accuracy,
)
from hardmix.metrics.statistics import Interval, PairedTest, holm, mean_interval, paired_test
from hardmix.metrics.zero_shot import class_features, few_shot_metrics, zero_shot_metrics

__all__ = [
    "Interval",
    "PairedTest",
    "ShotBins",
    "adaptive_calibration_error",
    "alignment_metrics",
    "arithmetic_metrics",
    "arithmetic_queries",
    "calibration_metrics",
    "caption_metrics",
    "choose_scale",
    "cider_scores",
    "class_features",
    "classification_metrics",
    "corrupt",
    "corruption_accuracy",
    "embedding_shift",
    "error_by_label",
    "few_shot_metrics",
    "fgsm_accuracy",
    "fit_query_temperature",
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
    "query_calibration",
    "regression_metrics",
    "relative_alignment",
    "reliability",
    "retrieval_calibration",
    "retrieval_metrics",
    "retrieval_ranks",
    "shot_bins",
    "shot_errors",
    "shot_metrics",
    "uniformity",
    "zero_shot_metrics",
]
