"""`torch.set_default_device` is about what the user makes: "meta" stands for any device that the inputs are not on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hardmix.losses import (
    FeatureSmoothing,
    M2MixLoss,
    SupReMixLoss,
    balanced_mse,
    imix_loss,
    lds_weights,
    multimodal_mix_loss,
    ranksim_loss,
    supremix_loss,
    unmix_loss,
)
from hardmix.losses.lipsum import random_tokens


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


A, B = torch.randn(2, 8, 4, generator=rng())
Y = torch.arange(8.0) // 2
PARTNER = torch.arange(8).flip(0)


def shared(generator: torch.Generator) -> Tensor:
    return M2MixLoss(accumulate=2)(A, B, 10.0, generator=generator)


CALLS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "supremix": lambda g: supremix_loss(A, Y, window=3.0, max_mixtures=1, generator=g),
    "SupReMix": lambda g: SupReMixLoss(window=3.0)(A, Y, generator=g),
    "ranksim": lambda g: ranksim_loss(A, Y),
    "label_mixture": lambda g: torch.cat(balanced_mse.label_mixture(Y, 2)),
    "lds_weights": lambda g: lds_weights(Y, bins=4),
    "M2Mix": shared,
    "multimodal_mix": lambda g: multimodal_mix_loss([A, B, A + B], generator=g),
    "multimodal_mix of a pair": lambda g: multimodal_mix_loss([A, B, A + B], pair=(0, 2), generator=g),
    "imix": lambda g: imix_loss(A, B, 10.0, partner=PARTNER, lam=0.3),
    "unmix": lambda g: unmix_loss(A, B, A, 10.0, lam=0.5),
    "random_tokens": lambda g: random_tokens(3, 2, generator=g),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_changes_nothing(name: str) -> None:
    want, generator = CALLS[name](rng(1)), rng(1)
    with torch.device("meta"):
        got = CALLS[name](generator)
    assert got.device.type == "cpu"
    assert torch.equal(got, want)


def test_buffers_are_made_together() -> None:
    with torch.device("meta"):
        module = FeatureSmoothing(4, label_range=(0, 4), bins=4)
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}
