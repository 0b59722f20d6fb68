"""The words of a report: names made harmless, numbers made readable, metrics explained."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any, NamedTuple

from hardmix.metrics.classification import certain

#: Longest name that is shown in full; what is cut off is counted.
MAX_NAME = 160
MAX_TEXT = 20_000

#: Control, format (bidi, zero width), surrogate and private characters, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


class Metric(NamedTuple):
    """How a metric is shown: a short label, one sentence for a reader, shares as per cent.

    `neutral`: neither more nor less of it is better in itself.
    """

    label: str
    about: str
    percent: bool = False
    lower_is_better: bool = False
    neutral: bool = False


METRICS = {
    "top1": Metric("top-1", "share of test images whose most likely class is the right one", percent=True),
    "top5": Metric("top-5", "share of test images whose right class is among the five most likely", percent=True),
    "nll": Metric("NLL", "negative log-likelihood: mean surprise at the right class, in nats", lower_is_better=True),
    "ece": Metric(
        "ECE",
        "expected calibration error: mean gap between confidence and accuracy, over bins of confidence",
        percent=True,
        lower_is_better=True,
    ),
    "pseudo_top1": Metric(
        "pseudo-class top-1",
        "share of unlabelled training images, up to 5,000, whose most likely class is right; labelled ones don't count",
        percent=True,
    ),
    "mean_top1": Metric("mean top-1", "top-1, mean over all subsets of the modalities that may be there", percent=True),
    "missing_0": Metric("complete top-1", "top-1 where no modality is missing", percent=True),
    "missing_1": Metric("top-1, one missing", "mean over which modality is missing", percent=True),
    "missing_2": Metric("top-1, two missing", "mean over which two are missing", percent=True),
    "missing_3": Metric("top-1, three missing", "mean over which three are missing", percent=True),
    "mae": Metric("MAE", "mean absolute error, in the target's unit", lower_is_better=True),
    "rmse": Metric("RMSE", "root of the mean squared error, in the target's unit", lower_is_better=True),
    "gm": Metric("GM", "geometric mean of the absolute errors: small where most are small", lower_is_better=True),
    "r2": Metric("R2", "share of the variance of the target that is explained"),
    "pearson": Metric("Pearson", "linear correlation of prediction and truth"),
    "spearman": Metric("Spearman", "rank correlation of prediction and truth"),
    "mae_many": Metric(
        "MAE many-shot",
        "mean absolute error where labels are frequent in training: more than 5/6 of the mean over bins of the label",
        lower_is_better=True,
    ),
    "mae_medium": Metric("MAE medium-shot", "mean absolute error where they are less frequent", lower_is_better=True),
    "mae_few": Metric(
        "MAE few-shot",
        "mean absolute error where they are rare or missing: less than 1/6 of that mean",
        lower_is_better=True,
    ),
    "ordinality": Metric("ordinality", "rank correlation of distances between features with distances in the target"),
    "local_linearity": Metric(
        "non-linearity",
        "distance of features from the straight line between those of the next lower and higher target, "
        "in distances to these",
        lower_is_better=True,
    ),
    "mrr": Metric("MRR", "mean of one over the place of the right one, over all searches in both directions"),
    "median_rank": Metric(
        "median rank",
        "place at which half of the searches have found the right one; mean of both directions",
        lower_is_better=True,
    ),
    "zeroshot": Metric(
        "zero-shot top-1",
        "share of test pictures whose class is the one with the nearest prompt, or a trained head's first",
        percent=True,
    ),
    "zeroshot_ece": Metric(
        "zero-shot ECE", "expected calibration error of these classes", percent=True, lower_is_better=True
    ),
    "arithmetic": Metric(
        "arithmetic R@1",
        "share of queries, a picture moved by the difference of two texts, that find the right picture first; mean "
        "over the kinds of difference",
        percent=True,
    ),
    "alignment": Metric(
        "alignment",
        "by how much texts are nearer to their own picture than to the nearest other one, in squared distances",
    ),
    "uniformity": Metric("uniformity", "how evenly pictures and texts together are spread over the sphere"),
    "caption_exact": Metric(
        "exact captions", "share of captions that are one of the picture's own texts, to the last token", percent=True
    ),
    "caption_edit_distance": Metric(
        "edit distance",
        "share of a caption's tokens that would have to change for it to be the nearest of the picture's own texts",
        lower_is_better=True,
    ),
    "caption_bleu_4": Metric("BLEU-4", "share of runs of one to four tokens that the own texts have too", percent=True),
    "caption_cider": Metric("CIDEr-D", "likeness of such runs from 0 to 10; those that few pictures have count more"),
    "gap": Metric("modality gap", "distance between the centres of pictures and of texts", neutral=True),
}

#: Beginnings of the metrics of image-text runs that are measured elsewhere, for labels and sentences.
PAIR_PLACES = {
    "seen_shift_": ("of seen concepts in other styles", "for concepts of the training, in styles that are not of it"),
    "shift_": ("in other styles", "in styles that are not of the training"),
}

#: Groups of an image-text run's metrics, in their order: title and what they are measured on.
PAIR_GROUPS = {
    "unseen": ("Unseen concepts, trained styles", "Retrieval among concepts that are not of this run's training."),
    "shift": ("Unseen concepts, other styles", "The same in styles that are not of this run's training."),
    "seen": ("Seen concepts, other styles", "Retrieval among concepts of the training, in styles that are not of it."),
    "captions": ("Captions", "What is written for pictures of unseen concepts, by beam search."),
    "classes": ("Classification", "Into classes, from texts alone (zero-shot) or from few labelled pictures."),
    "geometry": ("Geometry of the embeddings", "Where pictures and texts lie on the unit sphere."),
    "other": ("Other metrics", ""),
}

#: Endings of the metrics on mixed test images, whose names start with the policy that mixed them.
MIXED = {
    "both": ("both classes", "the two most likely classes are exactly the two mixed ones"),
    "top2": ("in top 2", "mean over the two mixed classes of being among the two most likely"),
    "either": ("either class", "the most likely class is one of the two mixed ones"),
}

#: what a sample may be, see `hardmix.data.numbers`; a report needs nothing else of that module
KINDS = ("rows", "series", "images", "volumes", "texts", "pairs")

TITLES = {
    "mixup": "Mixup",
    "cutmix": "CutMix",
    "smoothmix": "SmoothMix",
    "fmix": "FMix",
    "gridmix": "GridMix",
    "resizemix": "ResizeMix",
    "saliencymix": "SaliencyMix",
    "augmix": "AugMix",
    "manifold-mixup": "Manifold Mixup",
    "attentivemix": "AttentiveMix",
    "snapmix": "SnapMix",
    "guidedmix": "GuidedMix",
    "puzzlemix": "PuzzleMix",
    "co-mixup": "Co-Mixup",
    "automix": "AutoMix",
    "samix": "SAMix",
    "adautomix": "AdAutoMix",
    "alignmix": "AlignMix",
    "transmix": "TransMix",
    "tokenmix": "TokenMix",
    "mixpro": "MixPro",
    "smmix": "SMMix",
    "tl-align": "TL-Align",
    "mergemix": "MergeMix",
    "sumix": "SUMix",
    "supermix": "SuperMix",
    "random-choice": "a random choice of policies",
    "scheduled": "a scheduled policy",
    "none": "no mixing",
    "decoupled-mixup": "Decoupled Mixup",
    "decoupled-mixup-bce": "Decoupled Mixup (BCE)",
    "soft-cross-entropy": "cross-entropy",
    "soft-bce": "BCE",
    "c-mixup": "C-Mixup",
    "l1": "L1",
    "l2": "L2",
    "huber": "Huber",
    "focal-r": "Focal-R",
    "supremix": "SupReMix",
    "supcon": "SupCon",
    "rank-n-contrast": "Rank-N-Contrast",
    "adasupcon": "AdaSupCon",
    "kernel-contrast": "kernel contrast",
    "ranksim": "RankSim",
    "ordinal-entropy": "Ordinal Entropy",
    "conr": "ConR",
    "balanced-mse": "Balanced MSE",
}

#: Objectives of image-text pairs. They stand for a run by themselves where no policy mixes pictures.
PAIR_TITLES = {
    "clip": "CLIP",
    "siglip": "SigLIP",
    "m2-mix": "m\u00b2-Mix",
    "m2-mix-siglip": "m\u00b2-Mix (SigLIP)",
    "m3-mix": "m\u00b3-Mix",
    "cyclip": "CyCLIP",
    "hcl": "HCL",
    "i-mix": "i-Mix",
    "un-mix": "Un-Mix",
    "carot": "CaRot",
    "lipsum": "Lipsum-FT",
    "coca": "CoCa",
    "gmc": "GMC",
}
TITLES |= PAIR_TITLES

#: What is done with tuned weights before they are measured; such runs are called "m2-mix + wise-ft".
AFTER_TITLES = {"wise-ft": "WiSE-FT", "tpgm": "TPGM", "embedding-shift": "shifted embeddings"}
TITLES |= AFTER_TITLES

#: Algorithms for few labels, by which their runs are called.
FEW_TITLES = {
    "supervised": "Supervised only",
    "pseudo-label": "Pseudo-Labeling",
    "mean-teacher": "Mean Teacher",
    "mixmatch": "MixMatch",
    "remixmatch": "ReMixMatch",
    "uda": "UDA",
    "fixmatch": "FixMatch",
    "flexmatch": "FlexMatch",
    "freematch": "FreeMatch",
    "softmatch": "SoftMatch",
    "fine-tuning": "Fine-Tuning",
    "bss": "BSS",
    "co-tuning": "Co-Tuning",
    "self-tuning": "Self-Tuning",
}
TITLES |= FEW_TITLES


def visible(value: Any, limit: int = MAX_NAME, keep: str = "") -> str:
    """A text that can't hide or reorder anything: invisible characters become [U+202E], long texts are cut and counted.

    Args:
        value: anything; it is turned into a string first.
        limit: number of characters that are kept.
        keep: control characters to leave alone, such as the newline of a file.
    """
    text = value if isinstance(value, str) else str(value)
    shown = "".join(
        f"[U+{ord(c):04X}]" if unicodedata.category(c) in _HIDDEN and c not in keep else c for c in text[:limit]
    )
    return shown if len(text) <= limit else f"{shown}... ({len(text):,} characters)"


def number(value: Any) -> float | None:
    """A finite float, or None for anything else (missing, NaN, text, booleans)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def dig(tree: Any, *keys: str) -> Any:
    """tree[k1][k2]..., or None as soon as a step is missing or is not a table."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def metric(key: str) -> Metric:
    """What is known of a metric; an unknown one is shown under its own name."""
    start, here = pair_place(key)
    known = METRICS.get(here) or _numbered(here)
    if known is not None and start:
        where, about = PAIR_PLACES[start]
        return known._replace(label=f"{known.label} {where}", about=f"{known.about}; {about}")
    if known is not None:
        return known
    policy, _, ending = key.rpartition("_")
    if policy and ending in MIXED:
        label, about = MIXED[ending]
        title = title_of(policy)
        return Metric(f"{title}: {label}", f"half-and-half {title} test images: {about}", percent=True)
    return Metric(key, "")


def pair_place(key: str) -> tuple[str, str]:
    """("shift_", "recall_5") of "shift_recall_5": where a metric is measured, "" for where it was trained."""
    start = next((start for start in PAIR_PLACES if key.startswith(start)), "")
    return start, key.removeprefix(start)


def _numbered(key: str) -> Metric | None:
    """recall_5 or fewshot_4, for any number."""
    numbered = re.fullmatch(r"(recall|fewshot)_([1-9][0-9]{0,5})", key)
    if numbered is None:
        return None
    kind, k = numbered.groups()
    if kind == "recall":
        right = "first is" if k == "1" else f"first {k} include"
        return Metric(f"R@{k}", f"share of searches, in both directions, whose {right} the right one", percent=True)
    examples = "picture" if k == "1" else "pictures"
    return Metric(f"{k}-shot top-1", f"top-1 with {k} labelled {examples} of each class to learn from", percent=True)


def pair_group(key: str) -> str:
    """The entry of PAIR_GROUPS that a metric of an image-text run belongs to."""
    start, here = pair_place(key)
    if here.startswith(("zeroshot", "fewshot_")):
        return "classes"
    if here.startswith("caption_"):
        return "captions"
    if here in ("arithmetic", "alignment", "uniformity", "gap"):
        return "geometry"
    if here.startswith("recall_") or here in ("median_rank", "mrr", "ece"):
        return {"": "unseen", "shift_": "shift", "seen_shift_": "seen"}[start]
    return "other"


def is_pairs(summary: Any) -> bool:
    """Whether a run is one of pictures with texts."""
    return dig(summary, "task") == "image-text"


def title_of(name: Any) -> str:
    """The usual spelling of a policy or an objective."""
    return TITLES.get(name, name) if isinstance(name, str) else "no mixing" if name is None else str(name)


def things_of(summary: Any) -> str:
    """What a run's data set is made of."""
    kind = dig(summary, "data", "kind")
    return kind if isinstance(kind, str) and kind in KINDS else "images"


def telling(key: str, summary: Any) -> bool:
    """Whether a metric says something of this run: the number of its classes does not decide it."""
    names = dig(summary, "data", "classes")
    return not (isinstance(names, list) and certain(key, len(names)))


def step_seconds(summary: Any) -> float | None:
    """Seconds a training step; None where they are not known, or no step was made and they would be others'."""
    untrained = number(dig(summary, "checkpoint", "step")) == 0.0
    return None if untrained else number(dig(summary, "seconds", "per_step")) or None


def method_title(policy: Any, objective: Any) -> str:
    """'Mixup with Decoupled Mixup'."""
    if isinstance(objective, str):
        tuned, _, after = objective.rpartition(" + ")
        if after in AFTER_TITLES:
            return f"{method_title(policy, tuned)} + {AFTER_TITLES[after]}"
    if policy in (None, "none") and isinstance(objective, str) and objective in (*PAIR_TITLES, "none"):
        return PAIR_TITLES.get(objective, "No training")
    algorithm, _, of_pairs = objective.partition(" + ") if isinstance(objective, str) else ("", "", "")
    if algorithm in FEW_TITLES:
        pairs = f" with {title_of(policy)} pairs ({title_of(of_pairs)})" if of_pairs else ""
        return FEW_TITLES[algorithm] + pairs
    # Two stages, two objectives: "supremix + l1".
    losses = (
        " and ".join(title_of(part) for part in objective.split(" + ")) if isinstance(objective, str) else objective
    )
    if policy in (None, "none") and isinstance(objective, str) and " + " in objective:
        title = str(losses)  # "no mixing" would contradict a contrast that mixes
    else:
        title = f"{title_of(policy)} with {losses}" if objective else title_of(policy)
    return title[:1].upper() + title[1:]


def show(key: str, value: float | None, digits: int = 2) -> str:
    """A metric's value: '89.31 %' for shares, four significant digits otherwise, 'n/a' where there is none."""
    if value is None:
        return "n/a"
    if metric(key).percent:
        return f"{minus(f'{100 * value:.{digits}f}')}\u00a0%"
    return minus(_whole(value) or f"{value:#.4g}".rstrip("."))


def show_difference(key: str, value: float | None, digits: int = 2) -> str:
    """A signed difference: '+1.23 points' for shares."""
    if value is None:
        return "n/a"
    if metric(key).percent:
        return f"{minus(f'{100 * value:+.{digits}f}')}\u00a0points"
    return minus(_whole(value, "+") or f"{value:+.3g}")


def _whole(value: float, sign: str = "") -> str:
    """A large number without an exponent, as its interval has it; nothing for another one."""
    return f"{value:{sign}.0f}" if 1e3 <= abs(value) < 1e6 else ""


def show_range(key: str, low: float | None, high: float | None, *, signed: bool = False, digits: int = 2) -> str:
    """'88.9 to 89.7' without the unit, or an empty string where there is no interval."""
    if low is None or high is None:
        return ""
    if metric(key).percent:
        ends = [f"{100 * v:{'+' if signed else ''}.{digits}f}" for v in (low, high)]
    else:
        # As many decimals for both ends as the larger one needs for three digits, or four without a sign.
        largest = max(abs(low), abs(high))
        places = min(12, max(0, (2 if signed else 3) - math.floor(math.log10(largest)))) if largest else 0
        ends = [f"{v:{'+' if signed else ''}.{places}f}" for v in (low, high)]
    return " to ".join(minus(end) for end in ends)


def plain(value: float | None, digits: int = 4) -> str:
    """Significant digits, or 'n/a'."""
    return "n/a" if value is None else minus(f"{value:.{digits}g}")


def count(value: Any) -> str:
    """'3,000', or 'n/a'."""
    whole = number(value)
    return "n/a" if whole is None else minus(f"{whole:,.0f}")


def p_value(p: float | None) -> str:
    """'p = 0.012', 'p < 0.001', or an empty string."""
    if p is None:
        return ""
    return "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p:.3f}" if p < 0.1 else f"p\u00a0=\u00a0{p:.2f}"


def duration(seconds: float | None) -> str:
    """'48 s', '2 min 5 s', '1 h 3 min'."""
    if seconds is None:
        return "n/a"
    if seconds < 10:
        return f"{seconds:.2g}\u00a0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600:,}\u00a0h {whole % 3600 // 60}\u00a0min"


def minus(text: str) -> str:
    """A minus sign instead of a hyphen, and none before a zero."""
    zero = not any(c in "123456789" for c in text.split("e")[0])
    return text.lstrip("-") if zero else text.replace("-", "\u2212")
