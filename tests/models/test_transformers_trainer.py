"""A tiny CLIP and a tiny SigLIP with random weights in the `Trainer` of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardmix.integrations import transformers as integration
from hardmix.integrations.transformers import M2MixTrainerMixin, loss_func, pair_losses, with_return_loss
from hardmix.losses import ClipLoss, M2MixLoss, M2MixSigLipLoss, clip_loss, m2mix_loss, siglip_loss

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 16}


def tiny(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE))
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16))


def pairs(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Pictures of one colour, and the colour's place in the vocabulary as their text."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        word = int(torch.randint(2, 20, (), generator=generator))
        noise = torch.randn(3, 32, 32, generator=generator)
        samples.append({"pixel_values": noise + word / 5, "input_ids": torch.tensor([0, word, 1, 1])})
    return samples


def trainer(folder: Path, model: nn.Module, cls: Any = None, arguments: Any = (), **options: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "prediction_loss_only": True,
        "dataloader_pin_memory": False,
        **dict(arguments),
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **settings)
    make = integration.M2MixTrainer if cls is None else cls
    options = {"train_dataset": pairs(12), "eval_dataset": pairs(8, 2), **options}
    return make(model=model, args=args, **options)


def expected(outputs: Any, model: Any, weight: float, lam: float) -> Tensor:
    a, b = outputs.image_embeds, outputs.text_embeds
    return clip_loss(a, b, model.logit_scale.exp()) + weight * m2mix_loss(a, b, lam=lam)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    samples = pairs(6)
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def test_three_steps_train_every_weight(tmp_path: Path) -> None:
    model = tiny("clip")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = trainer(tmp_path, model, m2mix=M2MixLoss(weight=0.1))
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == run.state.global_step == 3
    assert all(0 < value < 20 for value in losses)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert set(run.last_losses) == {"contrastive_loss", "m2mix_loss"}
    assert not any(value.requires_grad for value in run.last_losses.values())
    assert losses[-1] == pytest.approx(float(sum(run.last_losses.values())), rel=1e-3)


def test_the_loss_is_clip_plus_weighted_m2(tmp_path: Path, batch: dict[str, Tensor], monkeypatch: Any) -> None:
    model = tiny("clip").train()
    run = trainer(tmp_path, model, m2mix=M2MixLoss(weight=0.5))
    monkeypatch.setattr(run.m2mix, "drawing", lambda generator: torch.Generator().manual_seed(4))
    loss, outputs = run.compute_loss(model, {**batch, "return_loss": True}, return_outputs=True)
    lam = float(m2mix_draw(4))
    assert 0 < lam < 1
    torch.testing.assert_close(loss, expected(outputs, model, 0.5, lam))
    assert torch.equal(loss, run.compute_loss(model, batch, num_items_in_batch=6))
    assert loss.requires_grad
    assert outputs.loss is None  # the model's own contrast is not computed as well
    torch.testing.assert_close(run.last_losses["contrastive_loss"] * 1, model(**batch, return_loss=True).loss.detach())


def m2mix_draw(seed: int) -> Tensor:
    from hardmix.mixing.draw import draw_beta

    return draw_beta(0.5, 0.5, 1, torch.Generator().manual_seed(seed))


def test_an_evaluation_is_the_contrast_alone_and_draws_nothing(tmp_path: Path) -> None:
    model = tiny("clip")
    run = trainer(tmp_path, model, m2mix=M2MixLoss(weight=5.0))
    first, second = run.evaluate()["eval_loss"], run.evaluate()["eval_loss"]
    model.eval()
    state = torch.get_rng_state()
    run.compute_loss(model, samples(pairs(4)))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        halves = [samples(pairs(8, 2)[start : start + 4]) for start in (0, 4)]
        want = sum(float(model(**half, return_loss=True).loss) for half in halves) / 2
    assert first == second == pytest.approx(want, rel=1e-5)


def samples(chosen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in chosen]) for name in chosen[0]}


def test_passes_of_one_step_are_averaged(tmp_path: Path) -> None:
    """Two passes over the same four pairs move the weights as one does, if lambda is the same."""
    moved = []
    for steps in (1, 2):
        model = tiny("clip")
        data = pairs(4) * steps
        arguments = {"gradient_accumulation_steps": steps, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
        arguments |= {"lr_scheduler_type": "constant"}
        loss = M2MixLoss(weight=0.5, alpha=1e4)  # lambda is always about a half
        run = trainer(tmp_path, model, None, arguments, m2mix=loss, train_dataset=data)
        order = torch.utils.data.SequentialSampler(data)  # the same pairs in both passes
        run._get_train_sampler = lambda *_, order=order: order
        before = model.visual_projection.weight.clone()
        run.train()
        moved.append(model.visual_projection.weight.detach() - before)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-2, atol=1e-7)


def test_a_schedule_is_told_the_epoch(tmp_path: Path) -> None:
    loss = M2MixLoss(weight=0.5, schedule="inverse")
    epochs = []
    arguments = {"max_steps": -1, "num_train_epochs": 3}
    run = trainer(tmp_path, tiny("clip"), None, arguments, m2mix=loss)
    told = loss.set_epoch
    loss.set_epoch = lambda epoch: (epochs.append(epoch), told(epoch))  # type: ignore[method-assign,assignment]
    run.train()
    assert epochs == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert int(loss.epoch) == 2


def test_a_siglip_gets_the_sigmoid_loss(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model = tiny("siglip")
    run = trainer(tmp_path, model)
    assert type(run.m2mix) is M2MixSigLipLoss
    run.train()
    loss, outputs = run.compute_loss(model.eval(), batch, return_outputs=True)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    torch.testing.assert_close(loss, siglip_loss(outputs.image_embeds, outputs.text_embeds, scale, bias))
    torch.testing.assert_close(loss, model(**batch, return_loss=True).loss, rtol=1e-5, atol=1e-5)
    assert type(trainer(tmp_path, tiny("clip")).m2mix) is M2MixLoss


def test_wrapped_models_and_other_losses(batch: dict[str, Tensor]) -> None:
    model = tiny("clip").eval()
    outputs = model(**batch)
    terms = pair_losses(M2MixLoss(weight=0.5), model, outputs, lam=0.3)
    torch.testing.assert_close(sum(terms.values()), expected(outputs, model, 0.5, 0.3))
    around = nn.Module()
    around.module = nn.Module()
    around.module._orig_mod = model
    again = pair_losses(M2MixLoss(weight=0.5), around, outputs, lam=0.3)
    assert torch.equal(again["m2mix_loss"], terms["m2mix_loss"])
    assert set(pair_losses(ClipLoss(), model, outputs)) == {"contrastive_loss"}
    gradient = torch.autograd.grad(terms["contrastive_loss"], model.logit_scale)[0]
    assert gradient.abs() > 0


def test_a_closure_for_a_plain_trainer(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    model = tiny("clip")
    outputs = model.eval()(**batch)
    loss = M2MixLoss(weight=0.5, alpha=1e4)
    whole = loss_func(loss, model)(outputs, None, num_items_in_batch=None)
    torch.testing.assert_close(whole, expected(outputs, model, 0.5, 0.5), rtol=1e-2, atol=0)
    torch.testing.assert_close(loss_func(loss, model, accumulation_steps=4)(outputs) * 4, whole, rtol=1e-2, atol=0)
    run = trainer(tmp_path, model, transformers.Trainer, compute_loss_func=loss_func(loss, model))
    before = model.text_projection.weight.clone()
    run.train()
    assert run.state.global_step == 3
    assert not torch.equal(model.text_projection.weight, before)
    with pytest.raises(ValueError, match="loss_func: accumulation_steps is 0; pass an integer of at least 1"):
        loss_func(loss, model, accumulation_steps=0)


def test_a_plain_trainer_has_an_eval_loss_only_where_the_batch_asks_for_one(tmp_path: Path) -> None:
    model = tiny("clip")
    assert "eval_loss" not in trainer(tmp_path, model, transformers.Trainer).evaluate()
    collate = with_return_loss(transformers.default_data_collator)
    assert collate(pairs(2))["return_loss"] is True
    run = trainer(tmp_path, model, transformers.Trainer, data_collator=collate)
    ours = trainer(tmp_path, model, data_collator=collate)
    assert run.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-5)


def test_the_mixin_before_ones_own_trainer(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        pass

    class Mixed(M2MixTrainerMixin, Own):
        pass

    assert issubclass(integration.M2MixTrainer, (M2MixTrainerMixin, transformers.Trainer))
    assert integration.M2MixTrainer is integration.M2MixTrainer
    run = trainer(tmp_path, tiny("clip"), Mixed)
    run.train()
    assert run.last_losses["m2mix_loss"] > 0


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({"compute_loss_func": print}, {}, ValueError, "M2MixTrainer: compute_loss_func would have no effect; pass"),
        ({}, {"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor would have no effect; leave it at 0"),
        ({"m2mix": ClipLoss()}, {}, TypeError, "M2MixTrainer: m2mix is a ClipLoss; pass an M2MixLoss or M2MixSigLip"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    tmp_path: Path, options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, tiny("clip"), None, arguments, **options)


def test_a_model_of_another_kind_is_named() -> None:
    outputs = SimpleNamespace(image_embeds=torch.ones(2, 3), text_embeds=torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"pair_losses: model is a Linear; pass a CLIP or SigLIP, with logit_scale"):
        pair_losses(M2MixLoss(), nn.Linear(2, 2), outputs)
    with pytest.raises(TypeError, match="in its outputs, image_embeds and text_embeds"):
        pair_losses(M2MixLoss(), tiny("clip"), SimpleNamespace(logits=torch.ones(2)))


def test_an_adapter_loads_no_library_that_it_fits(monkeypatch: Any) -> None:
    code = (
        "import sys\n"
        "import hardmix.integrations.transformers, hardmix.integrations.open_clip\n"
        "assert not {'transformers', 'open_clip', 'accelerate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.delattr(integration, "M2MixTrainer", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.trainer", None)
    with pytest.raises(ImportError, match=r"M2MixTrainer needs transformers; pip install transformers accelerate\."):
        integration.M2MixTrainer  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        integration.Other  # noqa: B018
