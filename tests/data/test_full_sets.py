"""The full data sets, where the environment variable HARDMIX_DATA says that they are."""

from __future__ import annotations

import os

import pytest
import torch

from hardmix.data import CATALOG, ImageData, find, load_images

#: published channel statistics of the training splits
STATISTICS = {
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "fashion-mnist": ((0.28604,), (0.35302,)),
    "mnist": ((0.13066,), (0.30811,)),
}


def loaded(name: str) -> ImageData:
    if "HARDMIX_DATA" not in os.environ:
        pytest.skip("HARDMIX_DATA is not set")
    if find(name).path is None:
        pytest.skip(f"{name} is not there")
    return load_images(name)


@pytest.mark.parametrize("name", STATISTICS)
def test_counts_balance_and_statistics(name: str) -> None:
    data = loaded(name)
    mean, std = STATISTICS[name]
    assert data.mean == pytest.approx(mean, abs=6e-6)
    assert data.std == pytest.approx(std, abs=6e-6)
    assert (len(data.train), len(data.test)) == (CATALOG[name].train, CATALOG[name].test)
    if name != "mnist":
        assert (torch.bincount(data.train.labels) == len(data.train) // 10).all()
        assert (torch.bincount(data.test.labels) == len(data.test) // 10).all()


def test_fashion_mini_is_the_start_of_each_class_of_fashion_mnist() -> None:
    full, mini = loaded("fashion-mnist"), load_images("fashion-mini")
    for whole, part in ((full.train, mini.train), (full.test, mini.test)):
        for label in range(10):
            rows = (whole.labels == label).nonzero()[: len(part) // 10, 0]
            assert torch.equal(whole.batch(rows), part.batch(torch.arange(label, len(part), 10)))
