"""The scale of channels against the whole set at once, and channels that never change."""

from __future__ import annotations

import pytest
import torch

from hardmix.data.numbers import ChannelScale


def test_channels_are_scaled_by_the_rows_of_the_fit() -> None:
    x = torch.randn(600, 3, 7, generator=torch.Generator().manual_seed(0)) * 5 + 1000
    rows = torch.arange(0, 600, 2)
    z = ChannelScale.fit(x, rows)(x)[rows].double()
    assert torch.allclose(z.mean((0, 2)), torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(z.std((0, 2), correction=0), torch.ones(3).double(), atol=1e-4)


@pytest.mark.parametrize(("value", "rows", "length"), [(36.6, 37, 50), (0.1, 350, 50), (1000.1, 350, 1000)])
def test_a_channel_that_is_constant_in_training_stays_in_its_unit(value: float, rows: int, length: int) -> None:
    x = torch.full((rows, 1, length), value)  # sums of these squares are rounded
    scale = ChannelScale.fit(x, torch.arange(rows))
    assert not scale(x).any()
    assert torch.allclose(scale(x + 0.5), torch.tensor(0.5), atol=1e-3)
