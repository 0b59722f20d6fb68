"""Every algorithm for few labels by its name in a recipe: it trains, its state is in the checkpoint, and it resumes."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import tomli_w
import torch
from PIL import Image

from hardmix import tables
from hardmix.data import load_images, train_validation_split
from hardmix.semi.co_tuning import category_relationship, learned_relationship
from hardmix.train import loop
from hardmix.train.errors import Interrupted, RecipeError
from hardmix.train.evaluate import evaluate_run
from hardmix.train.few_start import source_model, source_probs, source_relationship
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import check_recipe, load_recipe
from hardmix.train.seeds import derive
from hardmix.train.start import prepare_start, start_folder
from hardmix.train.state import load_checkpoint
from hardmix.train.tasks.few_labels import FewLabels

from .test_few_labels import recipe

TRANSFER = ("fine-tuning", "bss", "co-tuning", "self-tuning")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A classifier of five digits' worth of steps to start from."""
    table = {
        "name": "before",
        "data": {"name": "digits", "train_samples": 200, "augment": []},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 1, "batch_size": 50, "warmup_epochs": 0, "threads": 1},
    }
    folder = tmp_path_factory.mktemp("start") / "run"
    run_recipe(check_recipe(table, "before"), folder)
    return folder


def plan(name, start, *, pairs=False):
    sections = {"semi": {"algorithm": {"name": name}, "mu": 2, "steps_per_epoch": 3, "per_class": 2}}
    if name in TRANSFER:
        sections["tune"] = {"start": str(start)}
    if name == "self-tuning":
        sections["semi"]["algorithm"] |= {"dim": 8, "queue": 4}
    if pairs:
        sections["policy"] = {"name": "mixup"}
        sections["objective"] = {"name": "decoupled-mixup", "eta": 1.0, "asymmetric": True}
        sections["semi"] |= {"pair_ramp": 0.0, "pair_confident": False}
    return recipe(**sections)


@pytest.mark.parametrize("name", tables.ALGORITHMS)
def test_it_trains_and_a_stopped_run_goes_on_bit_exactly(name, start, tmp_path, monkeypatch):
    chosen = plan(name, start)
    summary = run_recipe(chosen, tmp_path / "whole")
    assert summary["objective"] == name
    after, done = FewLabels.end_step, []

    def stop(task):
        after(task)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(Interrupted):
            run_recipe(chosen, tmp_path / "parts")
    assert run_recipe(chosen, tmp_path / "parts", resume=True)["test"] == summary["test"]
    one, two = (load_checkpoint(tmp_path / place / "checkpoints", "last").tensors for place in ("whole", "parts"))
    for group in one:
        assert all(torch.equal(value, two[group][key]) for key, value in one[group].items()), group
    assert evaluate_run(tmp_path / "parts")["test"] == summary["test"]


@pytest.mark.parametrize("name", [name for name in tables.ALGORITHMS if tables.takes_pairs(name)])
def test_pairs_change_what_it_learns(name, start, tmp_path):
    run_recipe(plan(name, start), tmp_path / "plain")
    summary = run_recipe(plan(name, start, pairs=True), tmp_path / "pairs")
    assert summary["objective"] == f"{name} + decoupled-mixup"
    one, two = (
        load_checkpoint(tmp_path / place / "checkpoints", "last").tensors["model"] for place in ("plain", "pairs")
    )
    assert any(not torch.equal(value, two[key]) for key, value in one.items())
    assert '"loss_pair"' in (tmp_path / "pairs" / "metrics.jsonl").read_text()


def test_those_of_the_paper_take_pairs():
    with_pairs = {name for name in tables.ALGORITHMS if tables.takes_pairs(name)}
    assert {"fixmatch", "flexmatch", "mixmatch", "fine-tuning", "co-tuning", "self-tuning"} <= with_pairs


def test_co_tuning_starts_from_the_classifier_of_the_start(start):
    task = FewLabels(plan("co-tuning", start))
    before = load_checkpoint(start / "checkpoints", "last").tensors["model"]
    assert torch.equal(task.algorithm.source.weight, before["head.linear.weight"])
    torch.testing.assert_close(task.algorithm.relationship.sum(1), torch.ones(10))
    assert not torch.equal(task.network.get_submodule("head.linear").weight, before["head.linear.weight"])


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A start of 5 classes whose images, in a folder of their own, are darker than digits."""
    place = tmp_path_factory.mktemp("other")
    draws = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in "abcde":
            (place / "images" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(0, 40 + 10 * ord(label) % 50, (8, 8, 3), generator=draws)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / "images" / split / label / f"{number}.png")
    table = {
        "name": "other",
        "data": {"name": "folder", "path": str(place / "images"), "image_size": 8, "augment": [], "validation": 0.0},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 1, "batch_size": 20, "warmup_epochs": 0, "threads": 1},
    }
    run_recipe(check_recipe(table, "other"), place / "run")
    return place


def co_tuning(start, *, ema=0.0, **semi):
    return recipe(
        data={"name": "emoji-groups", "image_size": 8},
        semi={"algorithm": {"name": "co-tuning", **semi}, "per_class": 4, "steps_per_epoch": 3},
        tune={"start": str(start)},
        train={"ema": ema},
    )


def test_the_start_predicts_of_images_that_are_normalised_as_its_own_were(other):
    task = FewLabels(co_tuning(other / "run"))
    own = load_images("folder", other / "images", image_size=8)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (own.mean, own.std))
    raw = task.train_set.batch(torch.arange(len(task.train_set))).float() / 255
    source = source_model(task.network, task.recipe, task.train_set.shape).eval()
    with torch.no_grad():
        probs = source((raw - mean) / std).softmax(1)
        wrong = source(task.normalize(raw)).softmax(1)
    labels = task.train_set.labels
    torch.testing.assert_close(task.algorithm.relationship, category_relationship(probs, labels, 8))
    assert not torch.allclose(category_relationship(wrong, labels, 8), task.algorithm.relationship, atol=0.01)


def test_a_learned_relationship_holds_labelled_samples_out(other):
    task = FewLabels(co_tuning(other / "run", relationship="learned"))
    source = source_model(task.network, task.recipe, task.train_set.shape).eval()
    probs, labels = source_probs(source, task.recipe, task.train_set), task.train_set.labels
    rows, held = train_validation_split(labels, 8 / 32, seed=derive(0, "relationship"))
    assert labels[held].tolist() == list(range(8))
    want = learned_relationship(probs[rows], labels[rows], probs[held], labels[held], 8)
    assert torch.equal(task.algorithm.relationship, want)
    assert not torch.allclose(want, category_relationship(probs, labels, 8))
    with pytest.raises(ValueError, match=r"holds out a labelled sample of each class, and 'smileys-emotion' has 1;"):
        source_relationship(task.recipe, probs[::4], task.train_set.subset(torch.tensor([0])))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_co_tuning_is_measured_and_goes_on_without_its_start_and_the_data_of_that(other, ema, tmp_path, monkeypatch):
    place = tmp_path / "other"
    shutil.copytree(other / "run", place / "run")
    text = (place / "run" / "recipe.toml").read_text()
    (place / "run" / "recipe.toml").write_text(text.replace(str(other), str(place)))
    with pytest.raises(FileNotFoundError, match=r"whose images \(.*other/images'?\) aren't there, .*; put them back\."):
        FewLabels(co_tuning(place / "run", ema=ema))
    shutil.copytree(other / "images", place / "images")
    plan = co_tuning(place / "run", ema=ema)
    summary = run_recipe(plan, tmp_path / "whole")
    after, done = FewLabels.end_step, []

    def stop(task):
        after(task)
        done.append(1)
        if len(done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(Interrupted):
            run_recipe(plan, tmp_path / "parts")
    shutil.rmtree(place)
    assert evaluate_run(tmp_path / "whole")["test"] == summary["test"]
    build, shapes = loop.build_optimizer, []

    def build_with_room(model, recipe, *beside):
        shapes.extend(p.shape for p in model.parameters())
        return build(model, recipe, *beside)

    monkeypatch.setattr(loop, "build_optimizer", build_with_room)  # the size is right before anything is wrapped
    assert run_recipe(plan, tmp_path / "parts", resume=True)["test"] == summary["test"]
    assert (5,) in shapes


def test_a_model_that_does_not_fit_its_start_is_told_before_the_start_is_trained(tmp_path, start):
    """Nothing is trained here at all: the recipe is refused as it is read."""
    before = tmp_path / "before.toml"
    before.write_text('[data]\nname = "digits"\n[model]\nname = "small-cnn"\noptions = { width = 4 }\n')
    chosen = {"semi": {"algorithm": {"name": "bss"}}, "tune": {"start": str(before)}}
    recipe(**chosen)
    with pytest.raises(RecipeError, match=r"stem.0.weight is \(4, 1, 3, 3\) there and \(8, 1, 3, 3\) here"):
        recipe(**chosen, model={"options": {"width": 8}})
    with pytest.raises(RecipeError, match=r"whose weights don't fit model 'small-resnet'"):
        recipe(**chosen, model={"name": "small-resnet"})
    with pytest.raises(RecipeError, match=r"is \(4, 1, 3, 3\) there and \(4, 3, 3, 3\) here"):
        recipe(**chosen, data={"name": "emoji-groups"})
    with pytest.raises(RecipeError, match="width"):
        recipe(**chosen, model={"options": {"width": 0}})
    with pytest.raises(RecipeError, match=r"head names 'heat.linear', which is no linear layer"):
        recipe(**{**chosen, "semi": {"algorithm": {"name": "bss", "head": "heat.linear"}}})
    with pytest.raises(RecipeError, match=r"relationship=learned holds out .* and semi.per_class is 1"):
        recipe(**{**chosen, "semi": {"algorithm": {"name": "co-tuning", "relationship": "learned"}, "per_class": 1}})


def test_a_start_whose_data_are_missing_is_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HARDMIX_CACHE", str(tmp_path / "cache"))
    before = {"data": {"name": "folder", "path": str(tmp_path / "gone")}, "model": {"name": "small-cnn"}}
    (tmp_path / "before.toml").write_text(tomli_w.dumps({"name": "before", **before}))
    with pytest.raises(FileNotFoundError, match=r"^tune.start is .*before.toml, whose own data are missing \(.*gone"):
        run_recipe(recipe(tune={"start": str(tmp_path / "before.toml")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_read_again_whatever_its_start_has_become(tmp_path):
    before = tmp_path / "before.toml"
    before.write_text('[data]\nname = "digits"\n[model]\nname = "small-cnn"\noptions = { width = 4 }\n')
    plan = recipe(semi={"algorithm": {"name": "bss"}}, tune={"start": str(before)})
    (tmp_path / "saved.toml").write_text(plan.to_toml())
    for text in (before.read_text().replace("4", "8"), "not a recipe"):
        before.write_text(text)
        assert load_recipe(str(tmp_path / "saved.toml")) == plan
    before.write_text('[data]\nname = "digits"\n[model]\nname = "small-cnn"\noptions = { width = 8 }\n')
    with pytest.raises(ValueError, match=r"there and \(4, 1, 3, 3\) here"):  # before the start is trained
        prepare_start(load_recipe(str(tmp_path / "saved.toml")))
    before.unlink()
    assert load_recipe(str(tmp_path / "saved.toml")) == plan


def test_a_start_on_files_of_another_project_is_another_start(tmp_path, monkeypatch):
    """Where they are named alike, from the folder that each is run in."""
    before = '[data]\nname = "folder"\npath = "photos"\n[model]\nname = "small-cnn"\noptions = { width = 4 }\n'
    (tmp_path / "before.toml").write_text(before)
    plan = recipe(semi={"algorithm": {"name": "bss"}}, tune={"start": str(tmp_path / "before.toml")})
    folders = []
    for project in ("one", "two", "one"):
        (tmp_path / project).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / project)
        folders.append(start_folder(plan))
    assert folders[0] == folders[2] != folders[1]


def test_what_an_algorithm_lacks_is_told(start):
    with pytest.raises(RecipeError, match="co-tuning"):
        recipe(semi={"algorithm": {"name": "co-tuning"}})
    with pytest.raises(RecipeError, match='algorithm "mean-teacher" mixes no pairs'):
        recipe(semi={"algorithm": {"name": "mean-teacher"}}, policy={"name": "mixup"})
    with pytest.raises(RecipeError, match="unknown option"):
        recipe(semi={"algorithm": {"name": "self-tuning", "model": "resnet18"}})
