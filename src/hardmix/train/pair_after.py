"""What is done with a tuned image-text model before it is measured: WiSE-FT, TPGM, and the shift of embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from hardmix.losses import clip_loss
from hardmix.models.pair_captioner import PairNet
from hardmix.train.recipe import Recipe
from hardmix.train.weight_space import fit_radii, project, wise_ft

#: what is tried on the validation split where a recipe does not say how far to go
GRID = tuple(round(0.1 * step, 1) for step in range(11))
#: steps of TPGM, and pairs of each
TPGM_STEPS, TPGM_BATCH = 100, 128


class After(NamedTuple):
    """The model to measure, how far its embeddings are shifted, and what was chosen, for the summary."""

    model: PairNet
    shift: float
    chosen: dict[str, float]


class _Again:
    """Batches that can be gone through again, made as they are asked for."""

    def __init__(self, pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.pairs()


def after_tuning(
    recipe: Recipe,
    model: PairNet,
    start: Mapping[str, Tensor] | None,
    score: Callable[[PairNet, float], float],
    pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]],
) -> After:
    """Apply `tune.after`.

    Args:
        model: the tuned one, which stays as it is.
        start: the weights before tuning.
        score: of a model and a shift on the validation split; larger is better. Ties go to the smaller amount.
        pairs: gives batches (images, texts) of the validation split, what the towers take, for TPGM.
    """
    kind, amount = recipe.tune.after, recipe.tune.amount
    if kind == "nothing":
        return After(model, 0.0, {})
    if kind == "embedding-shift":
        shift = amount if amount >= 0.0 else max(GRID, key=lambda value: (score(model, value), -value))
        return After(model, shift, {"shift": shift})
    assert start is not None
    tuned = model.state_dict()
    # A head that the start lacks stays as it was trained.
    before = {name: start.get(name, value) for name, value in tuned.items()}
    held = copy.deepcopy(model)
    if kind == "tpgm":
        radii = fit_radii(
            held,
            before,
            lambda forward, batch: clip_loss(*(lambda found: (found.image, found.text, found.scale))(forward(*batch))),
            _Again(pairs),
            steps=TPGM_STEPS,
            exclude=[name for name, _ in held.named_parameters() if name.startswith("head.")],
        )
        held.load_state_dict(project(tuned, before, radii))
        return After(held, 0.0, {"radii": float(sum(radius.item() for radius in radii.values()))})

    def at(alpha: float) -> PairNet:
        held.load_state_dict(wise_ft(before, tuned, alpha))
        return held

    alpha = amount if amount >= 0.0 else max(GRID, key=lambda value: (score(at(value), 0.0), -value))
    return After(at(alpha), 0.0, {"alpha": alpha})
