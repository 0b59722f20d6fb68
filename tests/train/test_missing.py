"""The modalities task: complete samples, a joint and its latents, and accuracy where modalities are missing."""

from __future__ import annotations

import json

import pytest
import torch

from hardmix.cli import main
from hardmix.losses import GMCLoss
from hardmix.train.errors import RecipeError
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import check_recipe, load_recipe
from hardmix.train.state import load_checkpoint
from hardmix.train.tasks import TASKS
from hardmix.train.tasks.modalities import means


def recipe(**sections):
    table = {
        "name": "missing",
        "task": "modalities",
        "data": {"name": "emoji", "domain": "noto+twemoji", "image_size": 16, "train_samples": 200},
        "model": {
            "name": "multimodal",
            "options": {"dim": 8, "width": 16, "image": {"width": 4}, "text": {"buckets": 256, "width": 8}},
        },
        "objective": {"name": "gmc", "temperature": 0.1, "m2": 0.1},
        "train": {
            "epochs": 2,
            "batch_size": 32,
            "warmup_epochs": 0,
            "threads": 1,
            "log_every": 1,
            "optimizer": "adamw",
        },
    }
    for key, value in sections.items():
        joins = isinstance(table.get(key), dict) and not (key == "objective" and "name" in value)
        table[key] = {**table[key], **value} if joins else value
    return check_recipe(table, "missing")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("missing") / "run"
    return folder, run_recipe(recipe(), folder)


def test_a_sample_is_a_concept_with_a_picture_in_each_style_and_its_text():
    task = TASKS["modalities"](recipe())
    assert task.modalities == ("noto", "twemoji", "text")
    pairs, rows = task.data.pairs, task.rows["train"]
    styles = [[pairs.style_names[pairs.style[row]] for row in both] for both in rows.tolist()]
    assert all(names == ["noto", "twemoji"] for names in styles)
    assert torch.equal(task.data.concept[rows[:, 0]], task.data.concept[rows[:, 1]])
    labels, noto, twemoji, text = task.load(torch.arange(4))
    assert torch.equal(noto, pairs.images[rows[:4, 0]])
    assert torch.equal(twemoji, pairs.images[rows[:4, 1]])
    assert torch.equal(labels, task.data.labels[rows[:4, 0]])
    assert len(text) == 4
    train, test = (set(task.data.concept[task.rows[split][:, 0]].tolist()) for split in ("train", "test"))
    assert not train & test


def test_the_loss_is_cross_entropy_and_the_contrast():
    task = TASKS["modalities"](recipe())
    assert isinstance(task.objective, GMCLoss)
    batch = task.load(torch.arange(16))
    shared = torch.Generator().manual_seed(3)
    task.start_step(0.0, shared)
    task.model.eval()  # no dropout in what is compared
    loss, logged = task.loss(task.model, batch, torch.Generator().manual_seed(0))
    inputs = dict(zip(task.modalities, batch[1:], strict=True))
    out = task.model({name: x if name == "text" else x.float() / 255 for name, x in inputs.items()})
    contrast = task.objective(list(out.latents.values()), out.joint, generator=torch.Generator().manual_seed(3))
    expected = torch.nn.functional.cross_entropy(out.logits, batch[0]) + contrast
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logged["contrast"], contrast.detach())


def test_without_a_contrast_it_is_cross_entropy():
    table = recipe().model_dump(exclude_none=True) | {"objective": {"name": "soft-cross-entropy"}}
    task = TASKS["modalities"](check_recipe(table, "plain"))
    _, logged = task.loss(task.model, task.load(torch.arange(16)), torch.Generator())
    assert set(logged) == {"loss", "accuracy"}


def test_means_over_subsets():
    subsets = {"a": 0.1, "b": 0.2, "c": 0.3, "a+b": 0.4, "a+c": 0.5, "b+c": 0.6, "a+b+c": 0.7}
    assert means(subsets) == pytest.approx({"mean_top1": 0.4, "missing_0": 0.7, "missing_1": 0.5, "missing_2": 0.2})


def test_a_run_tells_every_subset(run):
    folder, summary = run
    subsets = summary["missing"]["subsets"]
    assert len(subsets) == 7
    assert summary["test"] == pytest.approx(means(subsets))
    assert summary["data"]["modalities"] == ["noto", "twemoji", "text"]
    page = (folder / "report.html").read_text()
    assert "Missing modalities" in page
    assert "noto + twemoji" in page
    assert "no reliability diagram" not in page


def test_eval_repeats_it_line_by_line(run, capsys, monkeypatch):
    folder, summary = run
    monkeypatch.setattr("sys.argv", ["hardmix", "eval", str(folder), "--task", "missing"])
    main()
    out = capsys.readouterr().out
    for value in summary["missing"]["subsets"].values():
        assert f"{100 * value:.1f}" in out
    monkeypatch.setattr("sys.argv", ["hardmix", "eval", str(folder), "--task", "retrieval"])
    with pytest.raises(SystemExit):
        main()
    assert "is for image-text runs" in capsys.readouterr().err


def test_it_is_the_same_twice_and_resumes(tmp_path, run):
    folder, _ = run

    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(), tmp_path / "again", progress=stop)
    run_recipe(recipe(), tmp_path / "again", resume=True)
    one, two = (
        load_checkpoint(place / "checkpoints", "last").tensors["model"] for place in (folder, tmp_path / "again")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    first, second = (json.loads((place / "summary.json").read_text()) for place in (folder, tmp_path / "again"))
    assert first["missing"] == second["missing"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"objective": {"name": "clip"}}, 'objective "clip" is not one of task "modalities"'),
        ({"objective": {"temperature": 0.0}}, "temperature is 0.0"),
        ({"model": {"name": "two-tower", "options": {}}}, "take multimodal"),
        ({"model": {"options": {"image": {"name": "subwords"}}}}, "subwords"),
        ({"policy": {"name": "mixup"}}, "no meaning for several modalities"),
        ({"train": {"accumulate": 2}}, "compared with each other"),
        ({"eval": {"parts": ["retrieval"]}}, "eval.parts is for image-text"),
        ({"tune": {"temperature": 0.1}}, "tune is a section of image-text"),
        ({"semi": {"mu": 3}}, "semi is a section of few-labels"),
        ({"task": "image-text"}, 'model "multimodal" is of task'),
    ],
)
def test_what_does_not_fit_is_told(sections, words):
    with pytest.raises((RecipeError, ValueError), match=words):
        TASKS["modalities"](recipe(**sections))


def test_sets_without_classes_are_refused(tmp_path):
    from PIL import Image

    for number in range(20):
        Image.new("RGB", (16, 16), (12 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = "\n".join(f"{number}.png,number {number}" for number in range(20))
    (tmp_path / "captions.csv").write_text("file,caption\n" + rows)
    data = {"name": "captions", "path": str(tmp_path), "domain": "", "train_samples": 0, "labels": "captions.csv"}
    with pytest.raises(ValueError, match="has no classes to tell"):
        TASKS["modalities"](recipe(data=data))


@pytest.mark.parametrize("name", ["emoji-missing-gmc", "emoji-missing-m2"])
def test_shipped_recipes_are_whole(name):
    assert load_recipe(name).task == "modalities"
