"""The adapter against timm itself: at the same lambda and box, the same images and targets."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hardmix.integrations.timm import Mixup
from hardmix.losses import DecoupledMixupLoss
from hardmix.mixing import MixedTarget
from hardmix.mixing.static import cut_box, cut_side

SIZE = (12, 18)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def knows_many_labels(module):
    """Older versions of timm mix rows of one label alone."""
    return "multi_label" in inspect.signature(module.Mixup).parameters


def draws_of(plan):
    """What timm would have to draw for this plan: lambda and, for CutMix, the box, for each row."""
    rows = []
    for i in range(len(plan)):
        lam, box = float(plan.lam[i]), None
        if plan.mask is not None:
            inside = (plan.mask[i, 0] == 0).nonzero()
            if len(inside):
                (top, left), (bottom, right) = inside.amin(0).tolist(), (inside.amax(0) + 1).tolist()
                box = (top, bottom, left, right)
            elif lam < 1 and plan.mask[i].min() == 1:
                box = (0, 0, 0, 0)  # CutMix with an empty box and an uncorrected lambda
        rows.append(SimpleNamespace(lam=lam, box=box))
    return rows


def feed(module, real, rows, monkeypatch):
    """Make timm draw `rows` instead of its own numbers; its arithmetic and its correction of lambda stay."""
    # A corrected lambda is recomputed from the box, so any other than 1 will do to get there.
    lams = [0.5 if row.box and real.correct_lam else row.lam for row in rows]
    boxes = iter([row.box for row in rows if row.box])
    for name in ("rand_bbox", "rand_bbox_minmax"):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: next(boxes))
    monkeypatch.setattr(real, "_params_per_batch", lambda: (lams[0], rows[0].box is not None))
    count = {"pair": len(rows) // 2}.get(real.mode, len(rows))
    cuts = [row.box is not None for row in rows]
    per_elem = np.array(lams[:count], dtype=np.float32), np.array(cuts[:count])
    monkeypatch.setattr(real, "_params_per_elem", lambda size: per_elem)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "settings",
    [
        {"mixup_alpha": 0.8},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "correct_lam": False},
        {"mixup_alpha": 0.0, "cutmix_minmax": (0.2, 0.8)},
        {"mixup_alpha": 0.8, "cutmix_minmax": [0.2, 0.8], "correct_lam": False, "label_smoothing": 0.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5, "switch_prob": 0.3, "label_smoothing": 0.3},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "multi_label": True},
    ],
    ids=lambda settings: "-".join(f"{key}={value}" for key, value in settings.items()),
)
def test_same_draws_same_results(timm_mixup, monkeypatch, mode, settings):
    if settings.get("multi_label") and not knows_many_labels(timm_mixup):
        pytest.skip("needs a timm that mixes rows of many labels")
    settings = {**settings, "mode": mode, "num_classes": 6}
    for seed in range(8):
        x = torch.rand(8, 3, *SIZE, generator=seeded(seed))
        y = torch.randint(6, (8,), generator=seeded(seed))
        if settings.get("multi_label"):
            y = torch.randint(2, (8, 6), generator=seeded(seed))
        ours = Mixup(**settings, generator=seeded(seed))
        rows = draws_of(ours.policy.plan(x, generator=seeded(seed)))
        with monkeypatch.context() as patched:
            real = timm_mixup.Mixup(**settings)
            feed(timm_mixup, real, rows, patched)
            expected_x, expected_y = real(x.clone(), y)
        mixed, dense = ours(x, y)
        assert torch.allclose(mixed, expected_x, atol=1e-6)
        assert torch.allclose(dense, expected_y, atol=1e-6)
        assert dense.dtype == expected_y.dtype == torch.float32


def test_disabled_mixing_is_the_same(timm_mixup):
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 2, 1, 2])
    results = []
    for make in (Mixup, timm_mixup.Mixup):
        mix = make(cutmix_alpha=1.0, num_classes=3)
        mix.mixup_enabled = False
        results.append(mix(x.clone(), y))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1])


def test_attributes_are_timms(timm_mixup):
    settings = {"mixup_alpha": 0.3, "cutmix_minmax": (0.2, 0.8), "prob": 0.7, "mode": "pair", "num_classes": 4}
    ours, real = Mixup(**settings), timm_mixup.Mixup(**settings)
    for name, value in vars(real).items():
        assert getattr(ours, name) == value, name
        setattr(ours, name, value)


def test_a_column_of_class_ids_is_the_same(timm_mixup):
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([[0], [2], [1], [2]])
    dense = [make(prob=0.0, num_classes=3)(x.clone(), y)[1] for make in (Mixup, timm_mixup.Mixup)]
    assert torch.allclose(*dense)


def test_whole_numbers_as_the_documentation_has_them(timm_mixup):
    """uint8 images in timm: Mixup of a batch fails, CutMix of one is right, and per row the labels lose lambda."""
    x, y = torch.randint(1, 256, (4, 1, 8, 8), dtype=torch.uint8), torch.arange(4)
    settings = {"num_classes": 4, "label_smoothing": 0.0}
    with pytest.raises(RuntimeError, match="can't be cast"):
        timm_mixup.Mixup(**settings)(x.clone(), y)
    mixed, dense = timm_mixup.Mixup(0.0, cutmix_minmax=(0.5, 0.7), **settings)(x.clone(), y)
    assert (mixed[:, 0] == x[:, 0]).float().mean((1, 2)).tolist() == pytest.approx(dense.diagonal().tolist(), abs=0.1)
    assert dense[0, 0] == 0.75
    for mode in ("pair", "elem"):
        assert timm_mixup.Mixup(mode=mode, **settings)(x.clone(), y)[1].diagonal().sum() == 0


def test_names_and_defaults_are_timms(timm_mixup):
    if not knows_many_labels(timm_mixup):
        pytest.skip("needs a timm that mixes rows of many labels")

    def arguments(make):
        return [(p.name, p.default) for p in inspect.signature(make).parameters.values() if p.kind != p.KEYWORD_ONLY]

    assert arguments(Mixup) == arguments(timm_mixup.Mixup)


@pytest.mark.parametrize("lam", [0.02, 0.3, 0.5, 0.77, 0.99])
def test_boxes_differ_by_a_pixel_at_most(timm_mixup, monkeypatch, lam):
    """timm truncates the sides, hardmix rounds them; where they are equally long, so are the boxes."""
    for centre in [(0, 0), (6, 9), (11, 17), (3, 16)]:
        at = iter(centre)
        monkeypatch.setattr(timm_mixup.np.random, "randint", lambda *args, _at=at, **kwargs: next(_at))
        top, bottom, left, right = timm_mixup.rand_bbox((3, *SIZE), lam)
        box = cut_box(cut_side(torch.tensor([lam]), 2), torch.tensor([centre]), SIZE)[0]
        assert (box - torch.tensor([[top, bottom], [left, right]])).abs().max() <= 1


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timms_own_soft_labels_go_into_the_decoupled_loss(timm_mixup, mode, smoothing):
    """Value against the two terms written out, with the pair and lambda that timm really mixed."""
    np.random.seed(0)  # the only place that timm draws from
    real = timm_mixup.Mixup(mode=mode, label_smoothing=smoothing, num_classes=10)
    y = torch.arange(8)
    x = torch.arange(8.0).view(8, 1, 1, 1).repeat(1, 1, 4, 4)
    mixed, dense = real(x, y)
    own, other = y.double(), 7.0 - y.double()
    lam = (mixed[:, 0, 0, 0].double() - other) / (own - other)  # rows hold their own number, so lambda can be read off
    pair = MixedTarget.from_dense(dense)
    logits = torch.randn(8, 10, generator=seeded(), dtype=torch.float64)
    expected = []
    for i in range(8):
        a, b = i, 7 - i
        shares = dict(zip(pair.labels[i].tolist(), pair.weights[i].tolist(), strict=True))
        assert shares == pytest.approx({a: lam[i].item(), b: 1 - lam[i].item()}, abs=1e-5)
        soft = np.full(10, smoothing / 10)
        soft[a] += (1 - smoothing) * lam[i].item()
        soft[b] += (1 - smoothing) * (1 - lam[i].item())
        z = logits[i].numpy()
        cross_entropy = -(soft * (z - np.log(np.exp(z).sum()))).sum()
        without_b = z[a] - np.log(np.exp(np.delete(z, b)).sum())
        without_a = z[b] - np.log(np.exp(np.delete(z, a)).sum())
        expected.append(cross_entropy - 0.1 * (without_a + without_b))
    loss = DecoupledMixupLoss(eta=0.1, reduction="none")(logits, dense)
    assert torch.allclose(loss, torch.tensor(expected), atol=1e-5)
