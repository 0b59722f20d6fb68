"""Numbers that are not finite end a run with the step, the samples and the first tensor that is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hardmix.train.errors import RunError
from hardmix.train.finite import not_finite_output, not_finite_weight
from hardmix.train.loop import run_recipe
from hardmix.train.tasks.classification import Classification

from .conftest import tiny


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def test_weights_are_looked_at_and_buffers_not() -> None:
    model = network()
    assert not_finite_weight(model) is None
    model[1].running_var[2] = torch.inf  # as masks of attention are
    assert not_finite_weight(model) is None
    model[2][1].bias.data[0] = torch.nan
    assert not_finite_weight(model) == "2.1.bias"


def test_the_first_layer_is_named_and_no_hook_stays() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e30)
    x = torch.full((5, 3), 1e30)
    assert not_finite_output(model, lambda: model(x)) == "0"
    assert not_finite_output(model, lambda: model(x * 0)) is None
    assert not_finite_output(model, lambda: model("no tensor")) is None  # a forward that can't be repeated
    assert not any(module._forward_hooks for module in model.modules())


def test_a_run_names_the_layer_and_the_step_of_its_log(tmp_path, monkeypatch) -> None:
    loss = Classification.loss
    calls = []

    def broken(self, model, batch, draws):
        calls.append(len(calls))
        if len(calls) == 3:  # the weights are finite, what comes out of them is not
            with torch.no_grad():
                next(p for name, p in self.on_pixels.named_parameters() if p.ndim == 4).mul_(3e38)
        return loss(self, model, batch, draws)

    monkeypatch.setattr(Classification, "loss", broken)
    with pytest.raises(RunError, match=r"the loss is \w+ at step 3; the first tensor .* is the output of [\w.]+ \(try"):
        run_recipe(tiny(train={"log_every": 1}), tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("what", ["weights", "output"])
def test_nothing_is_measured_of_a_network_that_broke_in_the_last_step(what, tmp_path, monkeypatch) -> None:
    end_epoch = Classification.end_epoch

    def broken(self, model, device):
        end_epoch(self, model, device)
        with torch.no_grad():
            head = [weight for weight in self.network.parameters() if weight.ndim == 2][-1]
            head.fill_(torch.nan if what == "weights" else 3e38)

    monkeypatch.setattr(Classification, "end_epoch", broken)
    told = {"weights": r"the weights \S+ are not finite after step \d+", "output": r"output is not finite for \d+ of"}
    with pytest.raises(RunError, match=told[what] + ".*; try a lower train.lr"):
        run_recipe(tiny(model={"name": "small-cnn", "options": {"width": 4}}), tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()
