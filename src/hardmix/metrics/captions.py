"""Captions against references: exact match, edit distance, BLEU and CIDEr.

CIDEr is written here: the one package that has it brings 100 MB of Java archives for its other metrics.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hardmix import _check

UNITS = ("word", "character")
#: longest n-gram
ORDER = 4
#: CIDEr-D: standard deviation of its penalty of lengths that differ, and its factor
SIGMA, FACTOR = 6.0, 10.0
#: tokens become characters for an edit distance of strings; here Unicode has room for a million
FIRST_CHARACTER = 0xE000

Tokens = Sequence[str]


def caption_metrics(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, unit: str = "word"
) -> dict[str, float]:
    """How well N captions agree with the references of their images.

        exact_match   = mean_i [c_i is one of the references]
        edit_distance = mean_i min_r d(c_i, r) / max(|c_i|, |r|),    d Levenshtein's, in tokens
        bleu_n        = min(1, exp(1 - R / C)) (p_1 ... p_n)^(1 / n),    p_k clipped precision of the k-grams of all
                        captions, C their tokens, R those of the references nearest in length, the shorter of two
        cider         = mean_i CIDEr-D, see `cider_scores`

    Args:
        candidates: N captions.
        references: one or more for each of them.
        unit: "word", what white space separates, or "character", white space included. Case and punctuation count: pass
            both sides as a tokenizer leaves them, see `CaptionTokenizer.plain`.

    Returns:
        dict with exact_match, edit_distance, bleu_1 ... bleu_4 and cider, as Python floats. Two empty captions are
        equal, with distance 0. A bleu_n is 0 where no n-gram is right, as for captions that are shorter than n. One
        image alone, or images whose references are all the same, have cider 0.

    Raises:
        TypeError: anything but strings. ValueError: no captions, another number of references, a caption without one.

    Reference: Papineni et al. 2002; Vedantam et al. 2015 (arXiv:1411.5726). BLEU and the edit distances are
    torchmetrics'. coco-caption adds a tiny number to counts, so that no BLEU is 0.

    >>> found = caption_metrics(["a cat", "a dog"], [["a cat"], ["one dog", "two dogs"]])
    >>> found["exact_match"], found["edit_distance"], found["bleu_1"]
    (0.5, 0.25, 0.75)
    """
    from torchmetrics.functional.text import bleu_score, edit_distance

    hypotheses, targets = _tokens("caption_metrics", candidates, references, unit)
    number: dict[str, int] = {}
    for tokens in [*hypotheses, *(target for of_one in targets for target in of_one)]:
        for token in tokens:
            number.setdefault(token, len(number))
    pairs = [(tokens, target) for tokens, of_one in zip(hypotheses, targets, strict=True) for target in of_one]
    coded = [["".join(chr(FIRST_CHARACTER + number[token]) for token in side) for side in pair] for pair in pairs]
    wrong = edit_distance([pair[0] for pair in coded], [pair[1] for pair in coded], reduction="none").tolist()
    shares = [d / max(1, *map(len, pair)) for d, pair in zip(wrong, pairs, strict=True)]
    distances, start = [], 0
    for of_one in targets:
        distances.append(min(shares[start : start + len(of_one)]))
        start += len(of_one)
    found = {
        "exact_match": _mean([tokens in of_one for tokens, of_one in zip(hypotheses, targets, strict=True)]),
        "edit_distance": _mean(distances),
    }
    # numbers between spaces, so that a token may be a space; the shortest first, which torchmetrics takes of two
    spaced = [" ".join(str(number[token]) for token in tokens) for tokens in hypotheses]
    against = [
        [" ".join(str(number[token]) for token in target) for target in sorted(of_one, key=len)] for of_one in targets
    ]
    for n in range(1, ORDER + 1):
        found[f"bleu_{n}"] = bleu_score(spaced, against, n_gram=n).item()
    found["cider"] = _mean(_cider(hypotheses, targets))
    return found


def cider_scores(candidates: Sequence[str], references: Sequence[Sequence[str]], *, unit: str = "word") -> list[float]:
    """CIDEr-D of each caption: how much its n-grams are those of the references, rare ones counting more.

        g_k(x)  = count of k in x * log(N / max(1, images with k in a reference))
        score_i = 10 / 4 sum_n mean_r exp(-(|c| - |r|)^2 / (2 * 6^2)) sum_k min(g_k(c), g_k(r)) g_k(r) / (|g(c)| |g(r)|)

    n = 1 ... 4, k over the n-grams; a caption or reference without n-grams that tell anything has 0 for that n.

    Args, errors: as of `caption_metrics`. How rare an n-gram is gets counted in the references of these N images, so
    scores of different sets can't be compared.

    Returns:
        N scores from 0 to 10. One image alone: 0, since nothing is rare.

    Reference: Vedantam et al. 2015 (arXiv:1411.5726). As the authors' code, this takes counts
    where the paper has shares of them, which the clipping can tell.
    """
    return _cider(*_tokens("cider_scores", candidates, references, unit))


def _cider(candidates: list[Tokens], references: list[list[Tokens]]) -> list[float]:
    counted = [[_ngrams(target) for target in of_one] for of_one in references]
    images = Counter(ngram for of_one in counted for ngram in set().union(*of_one))
    whole = math.log(len(candidates))

    def vectors(counts: Counter[Tokens]) -> tuple[list[dict[Tokens, float]], list[float]]:
        """For each n, the weights of n-grams and their length."""
        weights: list[dict[Tokens, float]] = [{} for _ in range(ORDER)]
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (whole - math.log(max(1, images[ngram])))
        return weights, [math.sqrt(sum(value * value for value in part.values())) for part in weights]

    scores = []
    for tokens, of_one, counts in zip(candidates, references, counted, strict=True):
        own, own_length = vectors(_ngrams(tokens))
        total = 0.0
        for target, target_counts in zip(of_one, counts, strict=True):
            theirs, their_length = vectors(target_counts)
            penalty = math.exp(-((len(tokens) - len(target)) ** 2) / (2 * SIGMA**2))
            for a, b, x, y in zip(own, theirs, own_length, their_length, strict=True):
                common = sum(min(value, b[ngram]) * b[ngram] for ngram, value in a.items() if ngram in b)
                total += penalty * common / (x * y) if x * y > 0 else 0.0
        scores.append(FACTOR * total / ORDER / len(of_one))
    return scores


def _ngrams(tokens: Tokens) -> Counter[Tokens]:
    return Counter(tuple(tokens[k : k + n]) for n in range(1, ORDER + 1) for k in range(len(tokens) - n + 1))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _tokens(
    who: str, candidates: Sequence[str], references: Sequence[Sequence[str]], unit: str
) -> tuple[list[Tokens], list[list[Tokens]]]:
    """Both sides, checked and split."""
    _check.choice(who, "unit", unit, UNITS)
    for name, value, what in (("candidates", candidates, "strings"), ("references", references, "lists of strings")):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{who}: {name} is a {type(value).__name__}; pass a list of {what}.")
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"{who}: there are {len(candidates)} candidates and lists of references for {len(references)}; pass a list "
            "for each, and at least one."
        )
    hypotheses, targets = [], []
    for row, (candidate, of_one) in enumerate(zip(candidates, references, strict=True)):
        if isinstance(of_one, str) or not isinstance(of_one, Sequence):
            raise TypeError(f"{who}: references of row {row} are a {type(of_one).__name__}; pass a list of strings.")
        if not of_one:
            raise ValueError(f"{who}: row {row} has no reference; pass at least one, or leave the row out.")
        wrong = next((text for text in (candidate, *of_one) if not isinstance(text, str)), "")
        if not isinstance(wrong, str):
            raise TypeError(f"{who}: row {row} holds a {type(wrong).__name__}; pass strings.")
        hypotheses.append(_split(candidate, unit))
        targets.append([_split(text, unit) for text in of_one])
    return hypotheses, targets


def _split(text: str, unit: str) -> Tokens:
    return text.split() if unit == "word" else list(text)
