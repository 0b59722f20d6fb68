"""The few-labels task: samples, steps, what is logged and measured, resuming, starts, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from torch import nn

from hardmix.train.compare import compare
from hardmix.train.errors import Interrupted, RecipeError, RunError
from hardmix.train.evaluate import evaluate_run
from hardmix.train.loop import run_recipe
from hardmix.train.recipe import check_recipe, load_recipe
from hardmix.train.run_folder import read_summary
from hardmix.train.state import list_steps, load_checkpoint
from hardmix.train.tasks import TASKS
from hardmix.train.tasks.few_labels import FewLabels


def recipe(**sections):
    """Ten labels a class of a sixth of Fashion-MNIST's embedded images, four steps an epoch."""
    table = {
        "name": "few",
        "task": "few-labels",
        "data": {"name": "digits", "validation": 0.1, "augment": ["crop"]},
        "semi": {"per_class": 2, "mu": 3, "steps_per_epoch": 4},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 2, "batch_size": 8, "warmup_epochs": 0, "ema": 0.9, "threads": 1, "log_every": 1},
        "eval": {"batch_size": 500},
    }
    for key, value in sections.items():
        table[key] = {**table[key], **value} if isinstance(table.get(key), dict) else value
    return check_recipe(table, "few")


def task_of(**sections):
    return TASKS["few-labels"](recipe(**sections))


def lines(folder, kind):
    read = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if line["kind"] == kind]


def test_a_part_of_a_set_is_at_most_all_and_has_every_class():
    assert len(task_of(data={"train_samples": 5000}).few.unlabelled) == len(task_of().few.unlabelled)
    with pytest.raises(ValueError, match=r"data\.train_samples is 9, but digits has 1,442 .* of 10 classes; .* 10 to "):
        task_of(data={"train_samples": 9})


def test_a_step_takes_mu_times_as_many_unlabelled_samples():
    task = task_of()
    task.start_epoch(0, 0)
    images, labels, others, truth, ids = task.load(torch.arange(8))
    assert len(images) == len(labels) == 8
    assert len(others) == len(truth) == len(ids) == 24
    assert len(ids.unique()) == 24
    assert torch.equal(task.few.unlabelled.batch(ids), others)
    assert torch.equal(task.truth[ids], truth)
    assert bool((task.few.unlabelled.labels == -1).all())
    # 20 labelled samples: the first 20 places hold each of them once
    first = task.load(torch.arange(20))[0]
    assert len(first.flatten(1).unique(dim=0)) == 20


def test_an_epoch_has_orders_of_its_own_and_repeats_them():
    task = task_of()
    task.start_epoch(0, 0)
    first = task.load(torch.arange(8))
    task.start_epoch(0, 1)
    assert not torch.equal(task.load(torch.arange(8))[4], first[4])
    task.start_epoch(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(task.load(torch.arange(8)), first, strict=True))


def test_labelled_samples_may_be_left_out_of_the_unlabelled_ones():
    both, apart = task_of(), task_of(semi={"include_labelled": False})
    assert len(both.few.unlabelled) - len(apart.few.unlabelled) == len(both.train_set) == 20
    assert apart.describe()["data"]["train"] == both.describe()["data"]["train"]


def test_a_run_logs_trust_and_writes_its_split(tmp_path):
    folder = tmp_path / "run"
    summary = run_recipe(recipe(), folder)
    assert summary["objective"] == "fixmatch"
    assert summary["data"]["labelled"] == 20
    assert 0.0 <= summary["test"]["pseudo_top1"] <= 1.0
    logged = lines(folder, "train")
    assert len(logged) == 8
    for line in logged:
        assert 0.0 <= line["trusted_right"] <= line["trusted"] <= 1.0
        assert line["loss"] == pytest.approx(line["loss_labelled"] + line["loss_unlabelled"], rel=1e-5)
    split = json.loads((folder / "split.json").read_text())
    assert len(split["labelled"]) == 20
    page = (folder / "report.html").read_text()
    assert "FixMatch" in page
    assert "Right pseudo-classes" in page
    # the same split by its file, for another seed
    split_file = {"per_class": 0, "split": str(folder / "split.json")}
    again = task_of(seed=7, semi=split_file, data={"validation": 0.0})
    assert torch.equal(again.split.labelled, torch.tensor(split["labelled"]))


def test_the_average_of_the_weights_is_what_is_measured(tmp_path):
    folder = tmp_path / "run"
    summary = run_recipe(recipe(), folder)
    assert evaluate_run(folder)["test"]["top1"] == summary["test"]["top1"]
    tensors = load_checkpoint(folder / "checkpoints", "last").tensors
    assert {name.split(".")[0] for name in tensors["model"]} <= {"backbone", "algorithm"}
    assert "module.stem.0.weight" in tensors["ema"]
    assert not any("algorithm" in name for name in tensors["ema"])


@pytest.mark.parametrize("policy", ["mixup", "cutmix"])
def test_pairs_are_mixed_where_there_is_a_policy(tmp_path, policy):
    changed = recipe(policy={"name": policy}, objective={"name": "decoupled-mixup", "eta": 1.0, "asymmetric": True})
    summary = run_recipe(changed, tmp_path / "run")
    assert summary["objective"] == "fixmatch + decoupled-mixup"
    assert summary["policy"] == policy
    assert any(line["loss_pair"] >= 0.0 for line in lines(tmp_path / "run", "train"))


def test_a_run_that_is_stopped_in_mid_epoch_goes_on_bit_exactly(tmp_path, monkeypatch):
    plan = recipe(policy={"name": "mixup"})
    run_recipe(plan, tmp_path / "whole")
    after, done = FewLabels.end_step, []

    def stop(task):
        after(task)
        done.append(1)
        if len(done) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(Interrupted, match="stopped at step 6"):
            run_recipe(plan, tmp_path / "parts")
    assert list_steps(tmp_path / "parts" / "checkpoints")[-1] == 6
    run_recipe(plan, tmp_path / "parts", resume=True)
    one, two = (load_checkpoint(tmp_path / name / "checkpoints", "last").tensors for name in ("whole", "parts"))
    for group in one:
        for name, value in one[group].items():
            assert torch.equal(value, two[group][name]), (group, name)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "parts" / "metrics.jsonl").read_text()


def test_two_runs_are_the_same_with_and_without_workers(tmp_path):
    for name, workers in (("none", 0), ("two", 2)):
        run_recipe(recipe(data={"workers": workers}), tmp_path / name)
    one, two = (load_checkpoint(tmp_path / name / "checkpoints", "last").tensors["model"] for name in ("none", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_split_that_has_changed_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    plan = recipe()

    def stop(task):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(plan, folder)
    text = (folder / "split.json").read_text()
    (folder / "split.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(RunError, match="another split than what digits gives now"):
        run_recipe(plan, folder, resume=True)


def test_it_starts_from_a_classifier_without_its_head(tmp_path):
    table = {
        "name": "before",
        "data": {"name": "digits", "train_samples": 200, "augment": []},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 1, "batch_size": 50, "warmup_epochs": 0, "threads": 1},
    }
    run_recipe(check_recipe(table, "before"), tmp_path / "before")
    task = task_of(tune={"start": str(tmp_path / "before")}, semi={"head_rate": 10.0})
    before = load_checkpoint(tmp_path / "before" / "checkpoints", "last").tensors["model"]
    own = task.network.state_dict()
    assert torch.equal(own["stem.0.weight"], before["stem.0.weight"])
    assert not torch.equal(own["head.linear.weight"], before["head.linear.weight"])
    assert set(task.rates().values()) == {10.0}
    head = task.network.get_submodule("head.linear")
    assert isinstance(head, nn.Linear)
    assert set(task.rates()) == set(head.parameters())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"semi": {"per_class": 0}}, "set semi.per_class, share or split"),
        ({"semi": {"share": 0.1}}, "both say which samples are labelled"),
        ({"semi": {"mu": 0}}, "semi.mu"),
        ({"semi": {"labelled": "x.csv"}}, 'semi.labelled is for data.name="folder"'),
        ({"semi": {"strong": ["rotate90"]}}, '"rotate90" is not a view'),
        ({"semi": {"algorithm": {"name": "fixmach"}}}, 'did you mean "fixmatch"'),
        ({"semi": {"algorithm": {"name": "fixmatch", "threshold": 1.5}}}, "threshold is 1.5"),
        ({"semi": {"algorithm": {"name": "fixmatch", "threshold": 0.0}}}, "above 0 and at most 1"),
        ({"semi": {"algorithm": {"name": "fixmatch", "tau": 0.9}}}, "unknown option"),
        ({"semi": {"algorithm": {"name": "self-tuning", "dim": 0}}}, "dim is 0"),
        ({"semi": {"algorithm": {"name": "bss", "k": 0}}}, "k is 0"),
        ({"semi": {"algorithm": {"name": "bss", "head": 3}}}, "head is 3; name a layer"),
        ({"semi": {"algorithm": {"name": "co-tuning", "weight": -1.0}}}, "weight is -1.0"),
        ({"semi": {"algorithm": {"name": "co-tuning", "relationship": "learnt"}}}, "there are direct, learned"),
        ({"semi": {"algorithm": {"name": "co-tuning", "relationship": 3}}}, "relationship is 3; name one of direct,"),
        ({"semi": {"algorithm": {"name": "bss", "relationship": "direct"}}}, "unknown option"),
        ({"tune": {"start": "few-transfer-start"}, "train": {"epochs": 0}}, "it would measure chance"),
        ({"semi": {"pair_weight": 1.0}}, "semi.pair_weight is of mixed pairs, and nothing is mixed"),
        ({"semi": {"pair_ramp": 0.5}}, "semi.pair_ramp is of mixed pairs"),
        ({"semi": {"pair_share": "any"}}, "semi.pair_share is of mixed pairs"),
        ({"semi": {"pair_confident": True}}, "semi.pair_confident is of mixed pairs"),
        ({"semi": {"algorithm": {"name": "mixmatch", "threshold": 0.8}}}, "threshold of .mixmatch. is of mixed pairs"),
        ({"semi": {"strong": ["cutout"], "algorithm": {"name": "mixmatch"}}}, "of which .mixmatch. takes none"),
        ({"semi": {"strong": ["cutout"], "algorithm": {"name": "supervised"}}}, "of which .supervised. takes none"),
        ({"semi": {"strong": ["cutout"], "algorithm": {"name": "self-tuning"}}}, "of which .self-tuning. takes none"),
        ({"semi": {"allow_overlap": True}}, 'semi.allow_overlap is for data.name="folder"'),
        ({"semi": {"per_class": 0, "split": "x.json"}}, "so data.validation=0.1 changes nothing"),
        (
            {"semi": {"per_class": 0, "split": "x.json", "include_labelled": True}, "data": {"validation": 0.0}},
            "leave semi.include_labelled out",
        ),
        ({"policy": {"name": "saliencymix"}}, "can't mix a labelled with an unlabelled sample"),
        ({"objective": {"name": "decoupled-mixup"}}, "nothing is mixed; add a policy"),
        ({"policy": {"name": "mixup"}, "objective": {"name": "soft-bce"}}, "is not one of pairs"),
        ({"tune": {"temperature": 0.1}}, "leave out all but tune.start"),
        ({"data": {"name": "folder"}}, "of a folder the files say"),
        ({"train": {"accumulate": 2}}, "would tear labelled samples from their unlabelled ones"),
        ({"policy": {"name": "random-choice", "policies": [{"name": "mixup"}]}}, "can't mix a labelled"),
        ({"semi": {"per_class": 0, "split": "x.json"}, "data": {"train_samples": 50}}, "leave one out"),
        ({"task": "classification"}, "semi is a section of few-labels recipes"),
    ],
)
def test_what_does_not_fit_is_told(sections, words):
    with pytest.raises(RecipeError, match=words.replace("(", r"\(")):
        recipe(**sections)


def test_what_has_an_effect_may_be_set():
    """The other side of the refusals above; and mu always, for recipes that are compared share it."""
    recipe(semi={"pair_ramp": 0.5, "pair_share": "any"}, policy={"name": "mixup"})
    recipe(semi={"algorithm": {"name": "mixmatch", "threshold": 0.8}}, policy={"name": "mixup"})
    recipe(semi={"algorithm": {"name": "self-tuning", "view": "strong"}, "strong": ["cutout"]})
    recipe(semi={"algorithm": {"name": "supervised"}, "mu": 7})


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"semi": {"algorithm": {"name": "supervised"}}},
        {"semi": {"per_class": 0, "split": "x.json"}, "data": {"validation": 0.0}},
    ],
)
def test_a_recipe_that_was_saved_with_its_run_is_read_again(sections, tmp_path):
    """It has every default written out, those too that a person is told to leave out."""
    plan = recipe(**sections)
    (tmp_path / "recipe.toml").write_text(plan.to_toml())
    assert load_recipe(str(tmp_path / "recipe.toml")) == plan


def test_a_recipe_is_read_without_a_draw():
    before = torch.get_rng_state()
    recipe(semi={"algorithm": {"name": "remixmatch"}})
    assert torch.equal(torch.get_rng_state(), before)


def test_pseudo_classes_are_judged_by_samples_that_are_not_trained_on():
    task = task_of()
    labelled = torch.isin(task.split.unlabelled, task.split.labelled)
    assert bool((task.truth[labelled] == -1).all())
    assert bool((task.truth[~labelled] >= 0).all())


def test_a_new_classifier_is_not_the_one_that_the_start_was_trained_with(tmp_path):
    table = {
        "name": "before",
        "data": {"name": "digits", "train_samples": 200, "augment": []},
        "model": {"name": "small-cnn", "options": {"width": 4}},
        "train": {"epochs": 1, "batch_size": 50, "warmup_epochs": 0, "threads": 1},
    }
    begun = TASKS["classification"](check_recipe(table, "before")).network.get_submodule("head.linear").weight.detach()
    run_recipe(check_recipe(table, "before"), tmp_path / "before")
    plan = recipe(tune={"start": str(tmp_path / "before")})
    head = FewLabels(plan).network.get_submodule("head.linear").weight.detach()
    assert not torch.equal(head, begun)
    cosine = torch.nn.functional.cosine_similarity(head.flatten(), begun.flatten(), dim=0)
    assert abs(float(cosine)) < 0.5
    run_recipe(plan, tmp_path / "after")
    shutil.rmtree(tmp_path / "before")
    assert evaluate_run(tmp_path / "after")["test"] == read_summary(tmp_path / "after")["test"]


def test_a_run_is_measured_without_the_split_file_that_it_was_given(tmp_path):
    run_recipe(recipe(), tmp_path / "first")
    given = tmp_path / "given.json"
    shutil.copy(tmp_path / "first" / "split.json", given)
    plan = recipe(semi={"per_class": 0, "split": str(given)}, data={"validation": 0.0})
    summary = run_recipe(plan, tmp_path / "second")
    given.unlink()
    assert evaluate_run(tmp_path / "second")["test"] == summary["test"]


def test_a_run_goes_on_without_the_split_file_that_it_was_given(tmp_path, monkeypatch):
    run_recipe(recipe(), tmp_path / "first")
    given = tmp_path / "given.json"
    shutil.copy(tmp_path / "first" / "split.json", given)
    plan = recipe(semi={"per_class": 0, "split": str(given)}, data={"validation": 0.0})
    whole = run_recipe(plan, tmp_path / "whole")
    after = FewLabels.end_step

    def stop(task):
        after(task)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(FewLabels, "end_step", stop)
        with pytest.raises(Interrupted):
            run_recipe(plan, tmp_path / "parts")
    given.unlink()
    assert run_recipe(plan, tmp_path / "parts", resume=True)["test"] == whole["test"]


def test_a_labelled_sample_by_itself_is_mixed_with_an_unlabelled_one(tmp_path):
    plan = recipe(policy={"name": "mixup"}, train={"batch_size": 1, "epochs": 1}, semi={"steps_per_epoch": 2})
    assert "loss_pair" in (run_recipe(plan, tmp_path), lines(tmp_path, "train"))[1][0]


def test_too_few_files_for_validation_are_told(own_folder):
    plan = own(own_folder)
    data = plan.data.model_copy(update={"validation": 0.01})
    with pytest.raises(ValueError, match=r"validation=0.01 can't be cut from 19 labelled files, of which a class"):
        FewLabels(plan.model_copy(update={"data": data}))


def test_a_class_with_too_few_samples_is_told():
    with pytest.raises(ValueError, match="of the 500 samples that each of 10 classes needs"):
        task_of(semi={"per_class": 500})


def test_the_shipped_recipe_is_whole():
    assert load_recipe("few-fixmatch").task == "few-labels"


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """24 labelled pictures of two classes in a folder with a table, and 40 others."""
    folder = tmp_path_factory.mktemp("own")
    draws = torch.Generator().manual_seed(0)
    (folder / "photos").mkdir()
    listed = ["file,class"]
    for number in range(64):
        name, dark = f"photos/{number:02}.png", number % 2
        pixels = torch.randint(0, 128, (12, 12, 3), generator=draws) + 127 * (1 - dark)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name)
        if number < 24:
            listed.append(f"{name},{'dark' if dark else 'light'}")
    (folder / "labels.csv").write_text("\n".join(listed) + "\n")
    return folder


def own(folder, **semi):
    return recipe(
        data={"name": "folder", "path": str(folder), "validation": 0.2},
        semi={"per_class": 0, "labelled": "labels.csv", **semi},
    )


def test_a_folder_of_ones_own_with_a_list_of_the_labelled_files(own_folder, tmp_path):
    summary = run_recipe(own(own_folder), tmp_path / "run")
    data = summary["data"]
    assert data["labelled"] + data["validation"] + data["test"] == 24
    assert data["unlabelled"] == 40 + data["labelled"]
    assert data["classes"] == ["dark", "light"]
    record = json.loads((tmp_path / "run" / "split.json").read_text())
    for part in ("labelled", "validation", "test"):
        assert len(record[part]) == data[part]
    assert "pseudo_top1" not in summary["test"], "no true class is known"
    assert "pseudo_right" not in lines(tmp_path / "run", "train")[0]
    assert "Right pseudo-classes" not in (tmp_path / "run" / "report.html").read_text()


def test_a_table_that_has_grown_is_told_before_what_was_trained_is_tested(own_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    run_recipe(own(folder), tmp_path / "run")
    with open(folder / "labels.csv", "a") as table:
        table.writelines(f"photos/{number}.png,{'dark' if number % 2 else 'light'}\n" for number in range(30, 50))
    with pytest.raises(RunError, match=r"than what .*/copy gives now, so what was trained on might be tested"):
        evaluate_run(tmp_path / "run")


def test_a_comparison_keeps_no_run_of_other_files(own_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    compare([own(folder)], [0], tmp_path / "all")
    compare([own(folder)], [0, 1], tmp_path / "all")
    with open(folder / "labels.csv", "a") as table:
        table.write("photos/30.png,light\n")
    with pytest.raises(RunError, match=r"seed-0 was trained on samples or labels that .* no longer has"):
        compare([own(folder)], [0, 1, 2], tmp_path / "all")


def test_files_that_have_moved_are_those_that_were_trained_on(own_folder, tmp_path, monkeypatch):
    shutil.copytree(own_folder, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    summary = run_recipe(own("photos"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "split.json").read_text())["labelled"][0][0].startswith("photos/")
    shutil.move("photos", "elsewhere")
    assert evaluate_run(tmp_path / "run", data_path=str(tmp_path / "elsewhere"))["test"] == summary["test"]


def test_a_validation_file_that_is_also_unlabelled_is_counted(own_folder, tmp_path):
    held = FewLabels(own(own_folder)).validation_set
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    shutil.copy(folder / "photos" / os.path.basename(held.sample_id(0)), folder / "photos" / "copy.png")
    with pytest.raises(ValueError, match="1 of 41 unlabelled files are also in the validation split"):
        FewLabels(own(folder))
    with pytest.warns(UserWarning, match="1 of 41 unlabelled files are also in the validation split"):
        found, apart = (FewLabels(own(folder, allow_overlap=True, include_labelled=both)) for both in (True, False))
    assert len(found.few.overlap) == 1
    assert found.few.mean == apart.few.mean


def test_files_for_validation_and_testing_are_not_among_the_unlabelled(own_folder):
    task = FewLabels(own(own_folder))
    unlabelled = {task.few.unlabelled.sample_id(i) for i in range(len(task.few.unlabelled))}
    for held in (task.validation_set, task.test_set):
        assert not unlabelled & {held.sample_id(i) for i in range(len(held))}
    assert {task.train_set.sample_id(i) for i in range(len(task.train_set))} <= unlabelled
    assert bool((task.truth == -1).all())


def test_fewer_unlabelled_samples_keep_their_classes(own_folder):
    plan = own(own_folder)
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"train_samples": 30})})
    task = FewLabels(plan)
    assert len(task.few.unlabelled) == len(task.truth) == 30
    parts = (task.few.train, task.few.unlabelled)
    files = {images.sample_id(i) for images in parts for i in range(len(images))}
    assert task.describe()["data"]["train"] == len(files) > 30, "some of the labelled ones are not among the others"
    task.start_epoch(0, 0)
    _, _, others, truth, _ = task.load(torch.arange(8))
    assert len(others) == len(truth) == 24


def test_an_overlap_of_files_is_refused_unless_it_is_asked_for(own_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    shutil.copy(folder / "photos" / "00.png", folder / "photos" / "copy.png")
    with pytest.raises(ValueError, match="1 of 41 unlabelled files are also"):
        FewLabels(own(folder))
    with pytest.warns(UserWarning, match="1 of 41 unlabelled files are also"):
        summary = run_recipe(own(folder, allow_overlap=True), tmp_path / "run")
    assert "1 of 41 unlabelled files" in summary["data"]["overlap"][0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was let pass in the data:</p>\n<ul>\n<li>1 of 41 unlabelled files" in page
    assert "could not show" not in page


def test_a_folder_without_a_name_is_told(own_folder, monkeypatch):
    monkeypatch.chdir(own_folder)
    with pytest.raises(FileNotFoundError, match=r"data\.path is empty"):
        FewLabels(own(""))


def test_classes_that_differ_in_case_alone_are_told(own_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    table = (
        (folder / "labels.csv").read_text().replace("01.png,dark", "01.png,Dark").replace("03.png,dark", "03.png,Dark")
    )
    (folder / "labels.csv").write_text(table + "photos/25.png,Dark\nphotos/27.png,Dark\n")
    with pytest.warns(UserWarning, match="the classes 'Dark' and 'dark', which differ in case alone"):
        FewLabels(own(folder))


def test_files_that_are_left_out_are_told(own_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(own_folder, folder)
    (folder / "photos" / "63.png").write_bytes(b"")
    plan = own(folder)
    plan = plan.model_copy(update={"data": plan.data.model_copy(update={"on_error": "skip"})})
    with pytest.warns(UserWarning, match="1 files of folder are left out"):
        run_recipe(plan, tmp_path / "run")
    assert "1 file was left out" in (tmp_path / "run" / "report.html").read_text()
