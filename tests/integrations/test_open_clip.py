"""open_clip's models and training loop with m2-Mix in the place of its losses; tiny models with random weights."""

from __future__ import annotations

import inspect
import json
import logging
import socket
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hardmix.integrations.open_clip import M2MixClipLoss, M2MixCoCaLoss, create_loss
from hardmix.losses import M2MixSigLipLoss, m2mix, m2mix_loss
from hardmix.models.clip_adapters import FREEZE, load_open_clip

IMAGE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
CONFIGS = {
    "tiny-clip": {"embed_dim": 16, "vision_cfg": IMAGE, "text_cfg": TEXT},
    "tiny-custom": {
        "embed_dim": 16,
        "vision_cfg": IMAGE,
        "text_cfg": TEXT,
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "tiny-resnet": {"embed_dim": 16, "vision_cfg": {**IMAGE, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT},
    "tiny-coca": {
        "embed_dim": 16,
        "vision_cfg": {**IMAGE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
        "custom_text": True,
    },
}
TEXTS = ["a cat", "a dog sat on a cat", "", "a house", "two cats", "a red car"]
RUN = {
    "device": "cpu",
    "precision": "fp32",
    "distill": False,
    "horovod": False,
    "siglip": False,
    "skip_scheduler": True,
}
RUN |= {"rank": 0, "world_size": 1, "local_loss": False, "gather_with_grad": False, "grad_clip_norm": None}
RUN |= {"batch_size": 3, "log_every_n_steps": 1, "wandb": False, "distributed": False, "local_rank": 0}
RUN |= {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 1.0, "loss_dist_impl": None}


@pytest.fixture(scope="module")
def open_clip(open_clip, tmp_path_factory):
    """open_clip, with the tiny models among those that it knows."""
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return open_clip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def make(open_clip):
    def model(name, seed=0, **options):
        torch.manual_seed(seed)
        if name != "tiny-coca":
            return open_clip.create_model(name, output_dict=True, **options)
        made = open_clip.create_model(name, **options)
        nn.init.normal_(made.text_decoder.text_projection, std=0.2)  # open_clip leaves it as the memory was
        return made

    return model


def batch(open_clip, count=6, seed=1, dtype=torch.float32):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return images.to(dtype), open_clip.get_tokenizer("tiny-clip")(TEXTS[:count])


def gradients(loss, model):
    values = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros((), dtype=torch.float64) if value is None else value for value in values]


def assert_same_training(ours, theirs, model):
    """The same value, and the same gradient of every weight of the model; float64 leaves no rounding in sight."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss"])
def test_arguments_are_those_of_open_clip_in_its_order(open_clip, name):
    theirs = inspect.signature(getattr(open_clip, name))
    ours = inspect.signature({"ClipLoss": M2MixClipLoss, "CoCaLoss": M2MixCoCaLoss}[name])
    shared = list(ours.parameters)[: 6 if name == "ClipLoss" else 3]
    assert list(theirs.parameters)[: len(shared)] == shared
    settings = dict.fromkeys(theirs.parameters, False) | {"rank": 0, "world_size": 1, "pad_id": 0}
    settings |= {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0}
    loss = {"ClipLoss": M2MixClipLoss, "CoCaLoss": M2MixCoCaLoss}[name]
    loss(*(settings[key] for key in theirs.parameters), weight=0.02)
    assert loss(**{key: settings[key] for key in theirs.parameters}, weight=0.02).weight == 0.02
    call = list(inspect.signature(getattr(open_clip, name).forward).parameters)
    assert list(inspect.signature(loss.forward).parameters)[: len(call)] == call


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-custom", "tiny-resnet"])
def test_the_contrast_is_open_clips(open_clip, make, name):
    model = make(name).double()
    out = model(*batch(open_clip, dtype=torch.float64))
    terms = M2MixClipLoss(weight=0.3, cache_labels=True, rank=0, world_size=1)(**out, output_dict=True)
    assert list(terms) == ["contrastive_loss", "m2mix_loss"]
    assert_same_training(terms["contrastive_loss"], open_clip.ClipLoss()(**out), model)


def test_with_a_weight_of_next_to_nothing_the_loss_is_open_clips(open_clip, make):
    model = make("tiny-clip").double()
    out = model(*batch(open_clip, dtype=torch.float64))
    assert_same_training(M2MixClipLoss(weight=1e-20)(**out), open_clip.ClipLoss()(**out), model)
    with pytest.raises(ValueError, match=r"M2MixClipLoss: weight is 0\.0; pass a finite number greater than 0"):
        M2MixClipLoss(weight=0.0)


def test_the_second_term_is_weighted_m2(open_clip, make):
    out = make("tiny-clip")(*batch(open_clip))
    terms = M2MixClipLoss(weight=0.3)(**out, output_dict=True, lam=0.4)
    want = 0.3 * m2mix_loss(out["image_features"], out["text_features"], lam=0.4)
    torch.testing.assert_close(terms["m2mix_loss"], want)
    torch.testing.assert_close(M2MixClipLoss(weight=0.3)(**out, lam=0.4), sum(terms.values()))


def test_coca_has_open_clips_contrast_and_captions(open_clip, make):
    model = make("tiny-coca").double()
    out = model(*batch(open_clip, dtype=torch.float64))
    theirs = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, pad_id=0)
    ours = M2MixCoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5, pad_id=0, cache_labels=True, weight=0.3)
    want = theirs(**out, output_dict=True)
    got = ours(**out, output_dict=True, lam=0.4)
    assert list(got) == ["contrastive_loss", "m2mix_loss", "caption_loss"]
    m2 = m2mix_loss(out["image_features"], out["text_features"], lam=0.4)
    torch.testing.assert_close(got["m2mix_loss"], 0.5 * 0.3 * m2)
    for key in want:
        assert_same_training(got[key], want[key], model)
    contrast, captions = ours(**out, lam=0.4)
    torch.testing.assert_close(contrast, got["contrastive_loss"] + got["m2mix_loss"])
    torch.testing.assert_close(captions, got["caption_loss"])


def test_captions_of_padding_alone_count_nothing():
    rows = torch.randn(3, 4)
    loss = M2MixCoCaLoss(2.0, 1.0, 5)
    logits = torch.randn(3, 4, 6, requires_grad=True)
    terms = loss(rows, rows.flip(0), logits, torch.full((3, 4), 5), 10.0, output_dict=True)
    assert terms["caption_loss"] == 0
    terms["caption_loss"].backward()
    assert not logits.grad.any()
    counted = loss(rows, rows.flip(0), logits, torch.tensor([[1, 5, 5, 5]] * 3), 10.0, output_dict=True)
    want = 2.0 * F.cross_entropy(logits[:, 0], torch.ones(3).long())
    torch.testing.assert_close(counted["caption_loss"], want)


class Loader:
    """What `train_one_epoch` asks of its data."""

    def __init__(self, batches):
        self.batches, self.num_batches = batches, len(batches)
        self.num_samples = sum(len(images) for images, _ in batches)

    def __iter__(self):
        return iter(self.batches)


def train(open_clip, open_clip_train, model, loss, *, epochs=1, batches=4, **options):
    args = Namespace(**RUN | {"accum_freq": 1, "model": "tiny"} | options)
    data = Loader([batch(open_clip, 3, seed) for seed in range(batches)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train = {"train": SimpleNamespace(dataloader=data, set_epoch=lambda epoch: None)}
    for epoch in range(epochs):
        open_clip_train.train_one_epoch(model, train, loss, epoch, optimizer, None, None, None, args)


@pytest.fixture
def drawn(monkeypatch):
    """The shares of each call of a loss, in the order of the calls."""
    calls, draw = [], m2mix.draw_shares
    monkeypatch.setattr(m2mix, "draw_shares", lambda *args: calls.append(draw(*args)) or calls[-1])
    return calls


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-custom", "tiny-coca"])
@pytest.mark.parametrize("accum_freq", [1, 2])
def test_open_clips_own_loop_trains_with_it(open_clip, open_clip_train, make, drawn, name, accum_freq):
    model = make(name)
    before = [parameter.clone() for parameter in model.parameters()]
    args = Namespace(**RUN | {"model": name, "accum_freq": accum_freq})
    loss = create_loss(args, weight=0.1)
    assert type(loss) is (M2MixCoCaLoss if name == "tiny-coca" else M2MixClipLoss)
    train(open_clip, open_clip_train, model, loss, batches=6, accum_freq=accum_freq)
    moved = [not torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True)]
    still = {key for key, _ in model.named_parameters() if "bias" in key and "logit" in key}
    assert sum(moved) >= len(moved) - len(still) - 2  # a bias of attention keys, and the bias of logits, cancel
    lam = torch.cat(drawn).flatten().tolist()
    assert len(lam) == 6
    cycles = [set(lam[start : start + accum_freq]) for start in range(0, 6, accum_freq)]
    assert all(len(cycle) == 1 for cycle in cycles), "one lambda for all calls of a step"
    assert len(set.union(*cycles)) == len(cycles)


def test_it_learns_pairs_in_open_clips_loop(open_clip, open_clip_train, make):
    torch.manual_seed(0)
    model = make("tiny-clip")
    images, texts = batch(open_clip, 3, 0)

    def loss():
        return float(open_clip.ClipLoss()(**model(images, texts)).detach())

    first = loss()
    train(open_clip, open_clip_train, model, M2MixClipLoss(weight=0.1), epochs=15)
    assert loss() < 0.5 * first


def test_half_types_of_autocast(open_clip, open_clip_train, make):
    model = make("tiny-clip")
    with torch.autocast("cpu", torch.bfloat16):
        terms = M2MixClipLoss(weight=0.1)(**model(*batch(open_clip)), output_dict=True)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    train(open_clip, open_clip_train, model, M2MixClipLoss(weight=0.1), precision="amp_bf16")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_main_branchs_tasks_find_only_terms_of_the_loss(open_clip, make):
    """A task of the main branch holds the model and the loss, and adds what ends in `_loss`; its scale may be (1,)."""

    class Task(nn.Module):
        def __init__(self, model, loss):
            super().__init__()
            self.trainable_module, self.loss = model, loss

        def forward(self, images, texts):
            out = self.trainable_module(images, texts)
            losses = self.loss(**out, output_dict=True)
            return sum(value for key, value in losses.items() if key.endswith("_loss")), sum(losses.values())

    model = make("tiny-clip", nonscalar_logit_scale=True)
    assert model.logit_scale.shape == (1,)
    task = Task(model, M2MixClipLoss(weight=0.1)).train()
    named, every = task(*batch(open_clip))
    assert torch.equal(named, every)
    assert named.shape == ()
    named.backward()
    assert model.logit_scale.grad.shape == (1,)
    assert not list(task.loss.parameters())


def test_the_real_tasks_of_the_main_branch(open_clip, make):
    task = pytest.importorskip("open_clip.task", reason="open_clip 3.x has no tasks; its main branch has")
    made = task.CLIPTask(make("tiny-clip"), loss=M2MixClipLoss(weight=0.1)).train()
    images, texts = batch(open_clip)
    assert made(images, texts)["loss"].isfinite()


def test_create_loss_follows_the_command_line(open_clip, open_clip_train):
    from open_clip_train.params import parse_args

    def args(*words):
        parsed = parse_args(list(words))
        parsed.rank, parsed.world_size, parsed.distill = 0, 1, False
        return parsed

    clip = create_loss(args("--model", "ViT-B-32", "--accum-freq", "4"), weight=0.05, alpha=2.0)
    assert (type(clip), clip.accumulate, clip.weight, clip.alpha) == (M2MixClipLoss, 4, 0.05, 2.0)
    coca = create_loss(args("--model", "coca_ViT-B-32", "--coca-caption-loss-weight", "3"))
    assert (type(coca), coca.caption_loss_weight, coca.clip_loss_weight) == (M2MixCoCaLoss, 3.0, 1.0)
    assert type(create_loss(args("--model", "ViT-B-16-SigLIP", "--siglip"))) is M2MixSigLipLoss
    for words in (["ViT-B-32"], ["coca_ViT-B-32"], ["ViT-B-16-SigLIP", "--siglip"]):
        ours, theirs = (make(args("--model", *words)) for make in (create_loss, open_clip.create_loss))
        assert type(ours).__name__ == f"M2Mix{type(theirs).__name__}"


def test_create_loss_refuses_what_it_can_not_do():
    with pytest.raises(ValueError, match=r"create_loss: args\.distill is set; leave it out"):
        create_loss(Namespace(distill=True, model="ViT-B-32"))
    with pytest.raises(ValueError, match=r"M2MixClipLoss: use_horovod is True; pass False and use torch\.distributed"):
        create_loss(Namespace(horovod=True, model="ViT-B-32"))
    with pytest.raises(ValueError, match="M2MixClipLoss: world_size is 8 but that of the process group is 1"):
        create_loss(Namespace(rank=0, world_size=8, model="ViT-B-32"))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"clip_loss_weight": 0.0}, ValueError, r"clip_loss_weight is 0\.0; pass a finite number greater than 0"),
        (
            {"caption_loss_weight": -1.0},
            ValueError,
            r"caption_loss_weight is -1\.0; pass a finite number of at least 0",
        ),
        ({"pad_id": -100}, ValueError, "pad_id is -100; pass an integer of at least 0"),
        ({"weigth": 0.1}, TypeError, "there is no setting 'weigth'"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=f"M2MixCoCaLoss: {message}"):
        M2MixCoCaLoss(**{"caption_loss_weight": 2.0, "clip_loss_weight": 1.0} | settings)


@pytest.fixture
def saved(make, tmp_path):
    def save(name, suffix="pt", prefix="", nested=False):
        model, path = make(name, seed=3), tmp_path / f"{name}.{suffix}"
        state = {prefix + key: value for key, value in model.state_dict().items()}
        if suffix == "safetensors":
            from safetensors.torch import save_file

            save_file(state, path)
        else:
            torch.save({"epoch": 2, "name": "run", "state_dict": state} if nested else state, path)
        return model.eval(), path

    return save


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_have_the_features_of_the_whole_model(open_clip, saved, name):
    model, path = saved(name)
    parts = load_open_clip(name, path)
    images, texts = torch.rand(4, 3, 32, 32), parts.tokenize(TEXTS[:4])
    assert torch.equal(texts, open_clip.get_tokenizer(name)(TEXTS[:4]))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (model.visual.image_mean, model.visual.image_std))
    with torch.no_grad():
        a, b = parts.image.eval()(images), parts.text.eval()(texts)
        want = (model.encode_image((images - mean) / std, normalize=False), model.encode_text(texts, normalize=False))
    torch.testing.assert_close(a, want[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, want[1], rtol=1e-5, atol=1e-6)
    assert a.shape == b.shape == (4, parts.features)
    assert (parts.image_size, parts.features) == (32, 16)
    assert parts.logit_scale == pytest.approx(1 / 0.07)
    assert parts.logit_bias == (-10.0 if name == "tiny-custom" else None)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-custom"])
def test_the_towers_share_nothing_and_have_all_weights(saved, name):
    model, path = saved(name)
    parts = load_open_clip(name, path)
    scalars = 1 if model.logit_bias is None else 2
    sizes = [sum(p.numel() for p in part.parameters()) for part in (parts.image, parts.text)]
    assert sum(sizes) == sum(p.numel() for p in model.parameters()) - scalars
    pointers = [{p.data_ptr() for p in part.state_dict().values()} for part in (parts.image, parts.text)]
    assert not pointers[0] & pointers[1]
    (parts.image(torch.rand(3, 3, 32, 32)).square().sum() + parts.text(parts.tokenize(TEXTS)).square().sum()).backward()
    for part in (parts.image, parts.text):
        assert all(p.grad is not None for p in part.parameters())


@pytest.mark.parametrize("form", [{"suffix": "safetensors"}, {"prefix": "module.", "nested": True}, {"suffix": "bin"}])
def test_files_of_open_clip_are_read(saved, form):
    model, path = saved("tiny-clip", **form)
    parts = load_open_clip("tiny-clip", path)
    assert torch.equal(parts.text.model.tower.token_embedding.weight, model.token_embedding.weight)


@pytest.mark.parametrize("freeze", FREEZE)
def test_what_is_frozen_computes_as_in_evaluation(saved, freeze):
    parts = load_open_clip("tiny-resnet", saved("tiny-resnet")[1], freeze=freeze)
    for name, part, x in (
        ("image", parts.image, torch.rand(2, 3, 32, 32)),
        ("text", parts.text, parts.tokenize(["a"])),
    ):
        frozen = freeze in (name, "both")
        before = {key: value.clone() for key, value in part.state_dict().items()}
        assert part.train()(x).requires_grad != frozen
        assert all(torch.equal(value, before[key]) for key, value in part.state_dict().items()) or not frozen


def test_a_local_folder_and_other_statistics(open_clip, saved, tmp_path):
    _, path = saved("tiny-clip")
    content = {"model_cfg": CONFIGS["tiny-clip"], "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.4]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    parts = load_open_clip(f"local-dir:{tmp_path}", path)
    torch.testing.assert_close(parts.image.scale.mean, torch.tensor([0.1, 0.2, 0.3]))
    given = load_open_clip("tiny-clip", path, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(given.image.scale.std, torch.full((3,), 0.25))
    with pytest.raises(ValueError, match=r"load_open_clip: std is \(0\.5, 0\.5\); it has to be three numbers"):
        load_open_clip("tiny-clip", path, std=(0.5, 0.5))


def test_loading_is_quiet_and_leaves_logging_as_it_was(saved, capfd):
    _, path = saved("tiny-clip")
    root = logging.getLogger()
    before, disabled = list(root.handlers), root.manager.disable
    capfd.readouterr()
    load_open_clip("tiny-clip", path)
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), root.manager.disable) == (before, disabled)


def test_weights_of_another_shape_are_named(saved, tmp_path):
    _, path = saved("tiny-clip")
    state = torch.load(path, weights_only=True)
    wide = {**state, "visual.proj": torch.zeros(32, 8)}
    torch.save(wide, path)
    wrong = r"does not fit the model \('visual\.proj' has shape \(32, 8\) instead of \(32, 16\)\); pass a checkpoint"
    with pytest.raises(ValueError, match=rf"^load_open_clip: checkpoint '.*' {wrong}") as caught:
        load_open_clip("tiny-clip", path)
    assert "\n" not in str(caught.value)
    torch.save({key: value for key, value in state.items() if key != "ln_final.bias"}, path)
    with pytest.raises(ValueError, match=r"does not fit the model \('ln_final\.bias' is missing\)"):
        load_open_clip("tiny-clip", path)
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'echo run'\ntR.")
    with pytest.raises(ValueError, match=r"checkpoint '.*code\.pt' cannot be read as plain tensors"):
        load_open_clip("tiny-clip", tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"checkpoint is '/none\.pt'; pass the path of an existing"):
        load_open_clip("tiny-clip", "/none.pt")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "ViT-B-16-SigLIP",
            ValueError,
            "the tokenizer of 'ViT-B-16-SigLIP' comes from a hub; save the model for trans",
        ),
        ("roberta-ViT-B-32", ValueError, "the text tower of 'roberta-ViT-B-32' comes from a hub"),
        ("ViT-B-33", ValueError, r"name is 'ViT-B-33'; pass one of open_clip\.list_models\(\) \(did you mean"),
        ("hf-hub:org/model", ValueError, r"name is 'hf-hub:org/model'; pass one of open_clip\.list_models\(\)"),
        ("local-dir:/none", ValueError, "'/none/open_clip_config.json' is no file; pass a folder that has one"),
        (None, TypeError, "name is None; pass the name of a model"),
    ],
)
def test_models_that_need_a_download_are_refused(open_clip, name, error, message):
    with pytest.raises(error, match=f"load_open_clip: .*{message}"):
        load_open_clip(name, "weights.pt")


def test_a_model_that_can_not_be_built_is_named(open_clip, tmp_path):
    content = {"model_cfg": {**CONFIGS["tiny-clip"], "vision_cfg": {**IMAGE, "patches": 3}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"load_open_clip: 'local-dir:.*' can't be built \(TypeError: .*patches.*\); pass"
    ):
        load_open_clip(f"local-dir:{tmp_path}", "weights.pt")


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-custom"])
def test_a_recipe_tunes_a_saved_model_and_eval_repeats_its_measures(name, saved, tmp_path):
    pytest.importorskip("accelerate", reason="the training side is another extra")
    from hardmix.train.evaluate import evaluate_run
    from hardmix.train.loop import run_recipe
    from hardmix.train.recipe import check_recipe

    table = {
        "name": "tuned",
        "task": "image-text",
        "data": {"name": "emoji", "domain": "noto", "image_size": 32, "train_samples": 64, "augment": ["crop"]},
        "model": {"name": "open-clip", "options": {"architecture": name, "checkpoint": str(saved(name)[1])}},
        "objective": {"name": "m2-mix-siglip" if name == "tiny-custom" else "m2-mix"},
        "train": {"epochs": 1, "batch_size": 32, "warmup_epochs": 0, "optimizer": "adamw", "lr": 1e-3, "threads": 1},
        "eval": {"parts": ["retrieval"]},
    }
    summary = run_recipe(check_recipe(table, "tuned"), tmp_path / "run")
    assert summary["model"]["name"] == "open-clip"
    assert 0.0 < summary["test"]["mrr"] <= 1.0
    assert evaluate_run(tmp_path / "run")["test"] == pytest.approx(summary["test"])
