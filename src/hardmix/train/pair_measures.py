"""What an image-text model is measured by: retrieval, calibration, classes, arithmetic, and how its space lies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hardmix.data.emoji import relations
from hardmix.metrics.alignment import alignment_metrics, embedding_shift
from hardmix.metrics.arithmetic import arithmetic_metrics, choose_scale
from hardmix.metrics.pair_calibration import fit_query_temperature, query_calibration, retrieval_calibration
from hardmix.metrics.retrieval import retrieval_metrics
from hardmix.metrics.zero_shot import class_features, few_shot_metrics, zero_shot_metrics
from hardmix.train.pair_captions import Writer, measure_captions
from hardmix.train.sections import MEASURES
from hardmix.train.seeds import generator
from hardmix.train.tasks.pair_data import PairData

#: the parts of a measurement, by which `hardmix eval --task` names them
PARTS = MEASURES
DIRECTIONS = ("image_to_text", "text_to_image")
CUTS = (1, 5, 10)
SHOTS, DRAWS = (1, 4, 16), 3
#: pairs in the picture of the sphere; texts in the examples and pictures that are shown for each
SPHERE, EXAMPLES, FOUND = 120, 6, 5


class Encoded(NamedTuple):
    """Pictures of one part of the set and the texts of their concepts: features, and the concept of each row."""

    images: Tensor
    texts: Tensor
    image_ids: Tensor
    text_ids: Tensor


class PairMeasures:
    """Measures one model on one set.

    Args:
        data: the set as the recipe sees it.
        images: rows of the set -> (n, D) features on the CPU.
        texts: texts -> (n, D).
        scale: of the logits.
        class_rows: (C, D) what stands for each class in the space of the features; None where there are no classes.
        shift: how far both modalities are moved towards each other, see `embedding_shift`, along the gap of the
            training pairs.
        writer: of captions; None for a model that writes none.
    """

    def __init__(
        self,
        data: PairData,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[list[str]], Tensor],
        *,
        scale: float,
        class_rows: Tensor | None,
        shift: float = 0.0,
        writer: Writer | None = None,
    ) -> None:
        self.data, self.scale, self.class_rows, self.shift = data, scale, class_rows, shift
        self._images, self._texts, self._writer = images, texts, writer
        self._gap: Tensor | None = None
        if shift:
            train = self._encode(data.rows["train"])
            own = torch.nn.functional.normalize(train.images).mean(0)
            self._gap = own - torch.nn.functional.normalize(train.texts).mean(0)

    def encode(self, rows: Tensor) -> Encoded:
        """Rows of the set, and each of their concepts' first texts."""
        found = self._encode(rows)
        if self._gap is None:
            return found
        images, texts = embedding_shift(found.images, found.texts, self.shift, gap=self._gap)
        return found._replace(images=images, texts=texts)

    def _encode(self, rows: Tensor) -> Encoded:
        ids = self.data.concept[rows]
        concepts = ids.unique()
        return Encoded(self._images(rows), self._texts(self.data.texts(concepts)), ids, concepts)

    def validate(self) -> dict[str, float]:
        """Recalls on the validation split; empty without one."""
        rows = self.data.rows["validation"]
        return {} if len(rows) < 2 else _recalls([self._retrieval(self.encode(rows))])

    def test(self, parts: Iterable[str] = PARTS) -> dict[str, Any]:
        """The parts asked for: "test" with one number for each metric, and what reports show beside."""
        wanted, test = set(parts), dict[str, float]()
        result: dict[str, Any] = {"test": test}
        styles = (*self.data.trained, *self.data.shifted) or ("",)
        unseen = {style: self.encode(self.data.style_rows("test", style)) for style in styles}
        own = [style for style in styles if style not in self.data.shifted]
        if "retrieval" in wanted:
            result["retrieval"] = self._all_retrieval(unseen, test)
        if "calibration" in wanted:
            result["calibration"] = self._calibration(unseen, test)
        if "zeroshot" in wanted and self.class_rows is not None:
            self._classes(unseen, test)
        if "arithmetic" in wanted and self.data.pairs.name == "emoji":
            result["arithmetic"] = self._arithmetic(own[0], test)
        if "geometry" in wanted:
            paired = _one_each(unseen[own[0]])
            test |= alignment_metrics(*paired)
            result["sphere"] = _sphere(*paired)
        if "caption" in wanted and self._writer is not None:
            result["captions"] = measure_captions(self.data, self._writer, test)
        return result

    def _all_retrieval(self, unseen: dict[str, Encoded], test: dict[str, float]) -> list[dict[str, Any]]:
        """Concepts that were never seen in each style, and seen ones in styles that were not."""
        lines = [self._line("unseen", style, encoded) for style, encoded in unseen.items()]
        seen = self.data.rows["train"]
        concepts = self.data.concept[seen].unique()
        order = torch.randperm(len(concepts), generator=generator(0, "seen"))
        # As many as there are unseen ones, so that the same number of candidates is looked through.
        some = concepts[order[: len(next(iter(unseen.values())).text_ids)]]
        for style in self.data.shifted:
            rows = self.data.style_rows("train", style)
            rows = rows[torch.isin(self.data.concept[rows], some)]
            if len(rows):
                lines.append(self._line("seen", style, self.encode(rows)))
        for prefix, part, shift in (("", "unseen", False), ("shift_", "unseen", True), ("seen_shift_", "seen", True)):
            if chosen := [line for line in lines if line["part"] == part and line["shift"] == shift]:
                test |= {f"{prefix}{key}": value for key, value in _recalls(chosen).items()}
        return lines

    def _line(self, part: str, style: str, encoded: Encoded) -> dict[str, Any]:
        shift = style in self.data.shifted
        return {"part": part, "style": style, "shift": shift, "pairs": len(encoded.images), **self._retrieval(encoded)}

    def _retrieval(self, encoded: Encoded) -> dict[str, float]:
        return retrieval_metrics(
            encoded.images, encoded.texts, image_ids=encoded.image_ids, text_ids=encoded.text_ids, ks=CUTS
        )

    def _calibration(self, unseen: dict[str, Encoded], test: dict[str, float]) -> dict[str, Any]:
        """Of the training style with its diagrams; of the other styles the error alone."""
        errors: dict[bool, list[float]] = {False: [], True: []}
        shown: dict[str, Any] = {}
        for style, encoded in unseen.items():
            found = retrieval_calibration(
                encoded.images,
                encoded.texts,
                self.scale,
                image_ids=encoded.image_ids,
                text_ids=encoded.text_ids,
            )
            errors[style in self.data.shifted] += [found[direction]["ece"] for direction in DIRECTIONS]
            shown = shown or found
        for shift, values in errors.items():
            if values:
                test["shift_ece" if shift else "ece"] = sum(values) / len(values)
        held = self.data.rows["validation"]
        if len(held) >= 2:
            validation, tested = self.encode(held), next(iter(unseen.values()))
            for direction in DIRECTIONS:
                own, other = _sides(validation, direction)
                heat = fit_query_temperature(own[0], other[0], self.scale, query_ids=own[1], candidate_ids=other[1])
                own, other = _sides(tested, direction)
                scaled = query_calibration(
                    own[0], other[0], self.scale / heat, query_ids=own[1], candidate_ids=other[1]
                )
                shown[direction]["scaled"] = {"temperature": heat, "ece": scaled["ece"]}
        if self.class_rows is not None and self.data.labels is not None:
            of_classes = [self._zero_shot(encoded)[1] for style, encoded in unseen.items() if style not in
                          self.data.shifted]  # fmt: skip
            shown["zeroshot"] = of_classes[0]
        return shown

    def _zero_shot(self, encoded: Encoded) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the classes, and their calibration."""
        assert self.class_rows is not None
        labels = self._labels(encoded)
        numbers = torch.arange(len(self.class_rows))
        diagram = query_calibration(
            encoded.images, self.class_rows, self.scale, query_ids=labels, candidate_ids=numbers
        )
        return zero_shot_metrics(encoded.images, self.class_rows, labels, self.scale), diagram

    def _labels(self, encoded: Encoded) -> Tensor:
        assert self.data.labels is not None
        of_concept = dict(zip(self.data.concept.tolist(), self.data.labels.tolist(), strict=True))
        return torch.tensor([of_concept[number] for number in encoded.image_ids.tolist()])

    def _classes(self, unseen: dict[str, Encoded], test: dict[str, float]) -> None:
        """Zero-shot by the prompts, or the head's, and linear probes on a few training samples of each class."""
        few = self._few_shot(unseen)
        for shift in (False, True):
            styles = [style for style in unseen if (style in self.data.shifted) == shift]
            prefix = "shift_" if shift else ""
            if styles:
                found = [self._zero_shot(unseen[style])[0] for style in styles]
                test[f"{prefix}zeroshot"] = _mean(line["top1"] for line in found)
                test[f"{prefix}zeroshot_ece"] = _mean(line["ece"] for line in found)
                for k in SHOTS if few else ():
                    test[f"{prefix}fewshot_{k}"] = _mean(few[style][k]["accuracy"] for style in styles)

    def _few_shot(self, unseen: dict[str, Encoded]) -> dict[str, dict[int, dict[str, float]]]:
        """Probes on training pictures; none where a class has no training picture to learn from."""
        support = self.encode(self.data.rows["train"])
        labels, tests = self._labels(support), {style: self._labels(encoded) for style, encoded in unseen.items()}
        if lacking := {int(label) for label in torch.cat(list(tests.values())).unique()} - set(labels.tolist()):
            warnings.warn(
                f"few shots are left out: no training picture shows {self.data.class_names[min(lacking)]!r}.",
                stacklevel=2,
            )
            return {}
        return few_shot_metrics(
            support.images,
            labels,
            {style: (encoded.images, tests[style]) for style, encoded in unseen.items()},
            ks=SHOTS,
            draws=DRAWS,
            generator=generator(0, "shots"),
        )

    def _arithmetic(self, style: str, test: dict[str, float]) -> dict[str, Any]:
        """Analogies of the test split in the training style, all of that style's pictures to choose from."""
        pairs = self.data.pairs
        assert pairs.style is not None
        rows = (pairs.style == pairs.style_names.index(style)).nonzero()[:, 0]
        encoded = self.encode(rows)
        place = {number: row for row, number in enumerate(encoded.image_ids.tolist())}
        # text row i is that of picture row i
        texts = encoded.texts[torch.searchsorted(encoded.text_ids, encoded.image_ids)]
        asked = {
            split: [r for r in relations(split=split) if place.keys() >= {r.a, r.b, r.c, r.d}]
            for split in ("validation", "test")
        }
        numbers = {
            split: torch.tensor([[place[concept] for concept in (r.a, r.b, r.c, r.d)] for r in found])
            for split, found in asked.items()
        }
        scale = choose_scale(encoded.images, texts, numbers["validation"])
        kinds = [r.kind for r in asked["test"]]
        found = arithmetic_metrics(encoded.images, texts, numbers["test"], scale=scale, kinds=kinds)
        # What the picture finds by itself, since that of a man is like that of a woman anyway.
        alone = arithmetic_metrics(encoded.images, texts, numbers["test"], scale=0.0, kinds=kinds)
        for kind, line in [*found["kinds"].items(), ("", found)]:
            line["recall_1_without_text"] = (alone["kinds"][kind] if kind else alone)["recall_1"]
        test["arithmetic"] = _mean(line["recall_1"] for line in found["kinds"].values())
        return {"scale": scale, **found}

    def examples(self) -> tuple[list[str], Tensor, Tensor]:
        """Some texts of the test split, the row of each one's picture in the set, and the rows found first (E, 5)."""
        rows = self.data.rows["test"]
        if self.data.pairs.style is not None:  # one style, or a text has several right pictures
            rows = self.data.style_rows("test", self.data.trained[0])
        encoded = self.encode(rows)
        chosen = torch.randperm(len(encoded.texts), generator=generator(0, "examples"))[:EXAMPLES]
        images, texts = (torch.nn.functional.normalize(x.float()) for x in (encoded.images, encoded.texts[chosen]))
        first = (texts @ images.T).topk(min(FOUND, len(images)), dim=1).indices
        concepts = encoded.text_ids[chosen]
        right = torch.stack([rows[(encoded.image_ids == number).nonzero()[0, 0]] for number in concepts])
        return self.data.texts(concepts), right, rows[first]


def class_rows(texts: Callable[[list[str]], Tensor], prompts: list[list[str]]) -> Tensor:
    """(C, D) unit rows of classes, each from its prompts."""
    features = texts([prompt for of_class in prompts for prompt in of_class])
    return class_features(features.split([len(of_class) for of_class in prompts]))  # type: ignore[no-untyped-call]


def _sides(encoded: Encoded, direction: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(queries, ids) and (candidates, ids)."""
    images, texts = (encoded.images, encoded.image_ids), (encoded.texts, encoded.text_ids)
    return (images, texts) if direction == "image_to_text" else (texts, images)


def _recalls(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Means over both directions, and over the lines."""
    found = {f"recall_{k}": _mean(line[f"{d}_recall_{k}"] for line in lines for d in DIRECTIONS) for k in CUTS}
    for key in ("median_rank", "mrr"):
        found[key] = _mean(line[f"{d}_{key}"] for line in lines for d in DIRECTIONS)
    return found


def _one_each(encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The first picture of each concept, and its text."""
    first = torch.tensor([int((encoded.image_ids == number).nonzero()[0, 0]) for number in encoded.text_ids.tolist()])
    return encoded.images[first], encoded.texts


def _sphere(images: Tensor, texts: Tensor) -> dict[str, list[list[float]]]:
    """The first pairs in the three directions in which all of them differ most, on a sphere."""
    count = min(SPHERE, len(images))
    both = torch.nn.functional.normalize(torch.cat([images[:count], texts[:count]]).float())
    # Not centred: the centre of the sphere is the point of reference.
    axes = torch.linalg.svd(both.double(), full_matrices=False).Vh[:3]
    signs = torch.where((both.double() @ axes.T).sum(0) < 0, -1.0, 1.0)
    points = torch.nn.functional.normalize(both.double() @ axes.T * signs)
    rounded = [[round(value, 4) for value in point] for point in points.tolist()]
    return {"image": rounded[:count], "text": rounded[count:]}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
