"""The command line, called as a user calls it."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from hardmix import tables
from hardmix.cli import main
from hardmix.data.catalog import load_images
from hardmix.data.few_labels import draw_label_split, write_split
from hardmix.train import show
from hardmix.train.seeds import generator

#: seconds instead of minutes
QUICK = [
    "--set", "data.name=digits", "--set", "data.train_samples=100", "--set", "train.epochs=1",
    "--set", "train.batch_size=32", "--set", "model.name=small-cnn", "--set", "model.options={width = 4}",
    "--set", "train.threads=1", "--set", "train.warmup_epochs=0",
]  # fmt: skip


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Call `hardmix ARGS` in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hardmix", *args])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("verb", ["demo", "run", "compare", "eval", "show", "data", "list", "copy", "report"])
def test_help_says_what_each_verb_does(cli, verb):
    code, out, _ = cli(verb, "--help")
    assert code == 0
    assert f"hardmix {verb}" in out
    assert len(out) > 200


def test_run_eval_report_and_resume(cli, tmp_path):
    code, out, err = cli("run", "demo-mixup-dm", *QUICK, "--out", "mine")
    assert code == 0, err
    assert "mine/report.html" in out
    summary = json.loads((tmp_path / "mine/summary.json").read_text())
    assert summary["objective"] == "decoupled-mixup"

    code, out, _ = cli("eval", "mine")
    assert code == 0
    assert f"{100 * summary['test']['top1']:.2f}" in out

    code, out, err = cli("eval", "mine", "--robustness", "--samples", "60")
    assert code == 0, err
    assert "occlusion" in out.lower()
    assert "How well it holds up" in (tmp_path / "mine/report.html").read_text()

    for options, message in (
        (("--robustness", "--task", "retrieval"), "--task is for one measure and --robustness for others; leave out"),
        (("--samples", "60"), "--samples belongs to --robustness; add that or leave it out"),
    ):
        code, _, err = cli("eval", "mine", *options)
        assert code == 2
        assert message in err

    (tmp_path / "mine/report.html").unlink()
    assert cli("report", "mine")[0] == 0
    assert (tmp_path / "mine/report.html").is_file()

    code, _, err = cli("run", "demo-mixup-dm", *QUICK, "--out", "mine")
    assert code == 3
    assert "mine already holds a run that is finished; pass another --out, such as mine-2." in err
    assert cli("run", "--resume", "mine")[0] == 0


@pytest.mark.parametrize("recipe", ["diabetes-l1", "diabetes-supremix"])
def test_run_trains_numbers_in_one_stage_and_in_two(cli, tmp_path, recipe):
    code, out, err = cli("run", recipe, "--smoke", "--out", "numbers")
    assert code == 0, err
    assert "MAE" in out
    assert (tmp_path / "numbers/report.html").is_file()


def test_help_shows_no_type_of_flags_and_breaks_no_sentence(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    for verb in ("run", "show", "eval"):
        assert "bool" not in cli(verb, "--help")[1]
    assert "bool" not in cli("--help")[1]
    for verb, words in (("demo", "text model\n before and after"), ("eval", "samples\n over lambda, temperature")):
        lines = [line.rstrip() for line in cli(verb, "--help")[1].splitlines()]
        assert words in "\n".join(lines)


def test_a_smoke_run_has_a_folder_of_its_own(cli, tmp_path):
    assert cli("run", "digits-cutmix-dm", "--smoke")[0] == 0
    assert (tmp_path / "runs/digits-cutmix-dm-smoke/seed-0/summary.json").is_file()
    assert not (tmp_path / "runs/digits-cutmix-dm").exists()
    code, _, err = cli("run", "digits-cutmix-dm", "--smoke")
    assert code == 3
    assert "is finished; pass another --out, such as runs/digits-cutmix-dm-smoke/seed-0-2." in err


def test_smoke_takes_few_images_and_as_many_as_it_is_told(cli, tmp_path):
    for row in range(40):
        path = tmp_path / "photos" / f"class {row % 4}" / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (row, 0, 0)).save(path)
    sets = ["--set", "data.name=folder", "--set", "data.path=photos", "--set", "model.name=small-cnn"]
    for more, out, rows in (((), "all", 29), (("--set", "data.train_samples=20"), "part", 18)):
        code, _, err = cli("run", "fashion-none", *sets, *more, "--smoke", "--out", out)
        assert code == 0, err
        assert json.loads((tmp_path / out / "summary.json").read_text())["data"]["train"] == rows
    (tmp_path / "photos").rename(tmp_path / "moved")
    code, _, err = cli("eval", "all")
    assert code == 2
    assert "all was trained on data.path = 'photos', which is not there; pass where it is now as --data-path" in err
    assert cli("eval", "all", "--data-path", "moved")[0] == 0


def test_smoke_takes_a_split_of_a_whole_set(cli, tmp_path):
    images = load_images("digits").train
    write_split(draw_label_split(images, name="digits", per_class=3, seed=0), tmp_path / "split.json")
    few = ["data.name=digits", "semi.split=split.json", "semi.per_class=0", "data.validation=0", "data.augment=[]"]
    small = ["model.name=small-cnn", "model.options={width = 4}", "train.threads=1", 'semi.strong=["crop", "cutout"]']
    sets = [word for key in (*few, *small) for word in ("--set", key)]
    code, _, err = cli("run", "few-fixmatch", *sets, "--smoke", "--out", "run")
    assert code == 0, err
    assert json.loads((tmp_path / "run/split.json").read_text())["samples"] == len(images)


def test_compare_writes_its_files_keeps_finished_runs_and_does_not_depend_on_jobs(cli, tmp_path):
    args = ["compare", "demo-none", "demo-mixup", "demo-mixup-dm", *QUICK, "--seeds", "2"]
    code, out, err = cli(*args, "--jobs", "1", "--out", "one")
    assert code == 0, err
    assert "Holm's correction" in out
    result = json.loads((tmp_path / "one/comparison.json").read_text())
    assert [row["name"] for row in result["table"]] == ["demo-none", "demo-mixup", "demo-mixup-dm"]
    (twin,) = result["twins"]
    assert (twin["name"], twin["base"]) == ("demo-mixup-dm", "demo-mixup")
    assert "Top-1, all but the objective alike:" in out
    seconds = {row["name"]: row["seconds_per_step"]["mean"] for row in result["table"]}
    costs = {row["name"]: row["relative_cost"] for row in result["table"]}
    assert costs == pytest.approx({name: value / seconds["demo-mixup"] for name, value in seconds.items()})
    assert "Cost: seconds a training step, demo-mixup = 1." in out
    assert "Rank: by the mean of top-1, 1 is best." in out
    means = {row["name"]: row["metrics"]["top1"]["mean"] for row in result["table"]}
    for name, own in means.items():
        rank = 1 + sum(other > own for other in means.values())
        (line,) = (line for line in out.splitlines() if re.match(rf"{name} +\d ", line))
        assert line.split()[1] == str(rank)
        assert line.split()[-1] == f"{costs[name]:.2f}"
    assert "against <bdi>demo-mixup</bdi>" in (tmp_path / "one/report.html").read_text()
    assert result["table"][0]["versus_first"] is None
    values = [row["metrics"]["top1"]["values"] for row in result["table"]]
    for test, a, b in (
        (result["table"][2]["versus_first"]["top1"], values[2], values[0]),
        (twin["tests"]["top1"], values[2], values[1]),
    ):
        assert test["difference"] == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 2)
    with open(tmp_path / "one/comparison.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 7
    assert (tmp_path / "one/report.html").stat().st_size > 10_000

    kept = (tmp_path / "one/demo-mixup/seed-0/metrics.jsonl").stat().st_mtime_ns
    assert cli(*args, "--jobs", "1", "--out", "one")[0] == 0
    assert (tmp_path / "one/demo-mixup/seed-0/metrics.jsonl").stat().st_mtime_ns == kept

    assert cli(*args, "--jobs", "2", "--out", "two")[0] == 0
    again = json.loads((tmp_path / "two/comparison.json").read_text())
    assert [run["test"] for run in again["runs"]] == [run["test"] for run in result["runs"]]


def test_what_runs_side_by_side_warn_of_is_told_once(tmp_path):
    for k in range(12):
        Image.new("RGB", (8, 8), (20 * k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "ages.csv").write_text("file,age\n" + "".join(f"{k}.png,{k}\n" for k in range(13)))
    keys = ["path=.", "labels=ages.csv", "target=age", "on_error=skip", "image_size=8"]
    sets = [word for key in keys for word in ("--set", f"data.{key}")]
    few = ["--set", "train.epochs=1", "--set", "train.warmup_epochs=0"]
    command = [sys.executable, "-m", "hardmix", "compare", "pictures-l1", *sets, *few, "--seeds", "2", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = (line for line in done.stderr.splitlines() if "left out" in line)
    assert line.startswith("hardmix: read_picture_table: left out 1 of 13 files that can't be read ")
    assert "UserWarning" not in done.stderr


def test_a_comparison_that_is_piped_folds_no_name(cli, tmp_path):
    names = ["demo-none", "demo-mixup-dm", "demo-cutmix-dm"]
    code, out, err = cli("compare", *names, *QUICK, "--seeds", "2", "--jobs", "1", "--out", "out")
    assert code == 0, err
    rows = [line.split()[0] for line in out.splitlines() if line.startswith("demo-")]
    assert rows == names


def test_compare_of_one_recipe_says_its_mean_and_interval_and_ranks_nothing(cli, tmp_path):
    code, out, err = cli("compare", "demo-mixup", *QUICK, "--seeds", "2", "--jobs", "1", "--out", "one")
    assert code == 0, err
    assert "Mean over 2 seeds with 95 % interval." in out
    assert "against" not in out
    assert "rank" not in out.lower()
    assert (tmp_path / "one/report.html").is_file()


def test_comparisons_that_begin_alike_have_folders_of_their_own(cli, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr("hardmix.cli._compare", lambda names, seeds, out, *rest: written.append(out.name))
    many = [f"fashion-{name}" for name in ("none", "mixup", "mixup-dm", "cutmix", "cutmix-dm", "resizemix", "sumix")]
    for names in (many[:2], [*many, "fashion-fmix"], [*many, "fashion-gridmix"]):
        assert cli("compare", *names)[0] == 0
    assert written[0] == "compare-fashion-none-fashion-mixup"
    assert len(set(written)) == 3
    assert max(map(len, written)) == 100


@pytest.mark.parametrize("name", tables.POLICIES)
def test_show_draws_every_policy(cli, tmp_path, name):
    code, out, err = cli("show", name, "--rows", "3")
    assert code == 0, err
    assert f"show-{name}.png" in out
    assert (tmp_path / f"show-{name}.png").read_bytes().startswith(b"\x89PNG")


def test_show_draws_all_policies_with_a_trained_model(cli, tmp_path):
    assert cli("run", "demo-none", *QUICK, "--set", "data.name=fashion-mini", "--out", "run")[0] == 0
    code, out, err = cli("show", "--all", "--run", "run")
    assert code == 0, err
    told = out.partition("Picture")[0]
    assert all(name in told for name in tables.POLICIES if name not in tables.NEEDS_ATTENTION)
    assert "transmix" not in told, "the model has no attention"
    with Image.open(tmp_path / "show-all.png") as sheet:
        assert sheet.height > 1000
    assert cli("show", "puzzlemix", "--run", "run", "--rows", "2")[0] == 0
    for wrong in ((), ("cutmix", "--all"), ("--all", "--set", "alpha=1")):
        code, _, err = cli("show", *wrong)
        assert code == 2
        assert "--all" in err


def test_show_draws_what_the_policy_of_a_run_has_learnt(cli, tmp_path):
    settings = ["--set", "policy.name=automix", "--set", "data.name=digits", "--set", "policy.layer=stage2"]
    assert cli("run", "demo-mixup", *QUICK, *settings, "--out", "run")[0] == 0
    subject = show._subject("", "", 3, 0, tmp_path / "run")
    assert subject.policy is not None
    drawn = show.draw("automix", subject, 0, {})
    learnt = subject.policy.plan(subject.x, subject.labels, generator=generator(0, "show", 1))
    assert torch.allclose(drawn.mask, learnt.mask, atol=1e-5)
    other = show.draw("automix", subject._replace(policy=None), 0, {})
    assert not torch.allclose(other.mask, drawn.mask)
    assert cli("show", "automix", "--run", "run", "--set", "alpha=1", "--rows", "2")[0] == 0


def test_data_and_list_name_everything(cli):
    code, out, _ = cli("data")
    assert code == 0
    for name in ("fashion-mini", "digits", "cifar10", "folder"):
        assert name in out
    code, out, _ = cli("list")
    assert code == 0
    for name in [*tables.POLICIES, *tables.OBJECTIVES, "small-resnet", "demo-cutmix-dm"]:
        assert name in out


def test_copy_writes_a_recipe_that_runs_and_never_overwrites(cli, tmp_path):
    assert cli("copy", "demo-mixup", "mine.toml")[0] == 0
    assert "alpha" in (tmp_path / "mine.toml").read_text()
    code, _, err = cli("copy", "demo-mixup", "mine.toml")
    assert code == 2
    assert "mine.toml exists" in err
    assert cli("copy", "demo-mixup", "new/folder/mine.toml")[0] == 0
    assert (tmp_path / "new/folder/mine.toml").is_file()
    assert cli("run", "mine.toml", *QUICK, "--out", "run")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["run", "demo-mixupp"], 2, 'did you mean "demo-mixup"'),
        (["run"], 2, "pass either a recipe to start or --resume"),
        (["run", "demo-mixup", "--set", "policy.alpha=-1"], 2, "alpha is -1"),
        (["run", "demo-mixup", "--seed", "3000000000"], 2, "seed: is 3000000000; input should be less than 2147483648"),
        (["compare", "demo-mixup", "--seeds", "3000000000"], 2, "'--seeds'"),
        (["demo", "--seeds", "3000000000"], 2, "'--seeds'"),
        (["show", "cutmix", "--seed", "3000000000"], 2, "'--seed'"),
        (["run", "demo-mixup", "--set", "data.name=folder"], 2, "no usual place; pass the path of a folder with one"),
        (["run", "demo-mixup", "--set", "data.name=cifar10", "--set", "data.path=nowhere"], 2, "nowhere"),
        (["run", "demo-mixup", "--set", "data.train_samples=3"], 2, "3"),
        (["show", "c-mixup"], 2, "c-mixup pairs by labels that are numbers"),
        (["compare", "demo-mixup", "demo-mixup"], 2, "two recipes are called demo-mixup"),
        (["compare", "demo-mixup", "--set", "data.train_samples=3", "--jobs", "1"], 2, "samples is 3"),
        (["compare", "demo-mixup", "--set", "data.train_samples=3", "--jobs", "2"], 2, "samples is 3"),
        (["run", "demo-mixup", "--set", "train.precision=fp16", "--set", "train.device=cpu"], 2, "take bf16"),
        (["run", "demo-mixup", "--set", "policy=cutmix"], 2, "set policy.name=cutmix"),
        (["show", "cutmix", "--all"], 2, "--all shows every policy, not cutmix alone"),
        (["show", "cutmix", "--data", "digitz"], 2, "show: --data is 'digitz'"),
        (["show", "cutmix", "--out", "/dev/null/x.png"], 2, "/dev/null/x.png can't be written"),
        (["copy", "demo-mixup", "/dev/null/x.toml"], 2, "/dev/null/x.toml can't be written"),
        (["show", "cutmix", "--out", "x.jpg"], 2, "but the picture is a PNG; name a file that ends in .png"),
        (["show", "--all", "--out", "x.jpg"], 2, "but the picture is a PNG; name a file that ends in .png"),
        (["show", "cutmix", "--set", "policy.alpha=1"], 2, "policy.alpha is alpha here"),
        (["show", "cutmix", "--set", "name=mixup"], 2, "hardmix show NAME"),
        (["show", "random-choice", "--set", 'policies=["mixup"]'], 2, "a nested policy is 'mixup'; write {"),
        (["show", "random-choice", "--set", 'policies=[{alpha=1.0}, "none"]'], 2, "a nested policy is {'alpha': 1.0}"),
        (["show", "scheduled", "--set", "policy=mixup"], 2, "a nested policy is 'mixup'; write {"),
        (["show", "sumix", "--set", "policy=mixup"], 2, "a nested policy is 'mixup'; write {"),
        (["show", "cutmixx"], 2, 'did you mean "cutmix"'),
        (["eval", "nowhere"], 2, "nowhere is no run folder"),
        (["run", "--resume", "nowhere"], 2, "nowhere is no run folder"),
        (["run", "--resume", "nowhere", "--seed", "3"], 2, "leave out --set, --seed"),
        (["report", "nowhere"], 2, "nowhere is no run folder"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(cli, tmp_path, args, code, message):
    got, out, err = cli(*args)
    assert got == code, (out, err)
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_report_leaves_a_folder_that_holds_no_run_alone(cli, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    code, _, err = cli("report", ".")
    assert code == 2
    assert "it holds no recipe.toml" in err
    assert (tmp_path / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("each", "validation", "message"),
    [
        (1, 0.1, "'own' has 2 images of 2 classes, too few to cut a test split from; have 5 or more of each class"),
        (3, 0.1, "set data.validation=0, or have 3 or more training images of each class"),
        (3, 0, "the test split of folder shows one class only; add images, of a folder without a test split 5 or more"),
    ],
)
def test_a_folder_with_few_images_is_told_what_it_takes(cli, tmp_path, each, validation, message):
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "own" / name / f"{i}.png")
    own = ["--set", "data.name=folder", "--set", "data.path=own", "--set", "data.train_samples=0"]
    code, _, err = cli("run", "demo-none", *own, "--set", f"data.validation={validation}")
    assert code == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path, signum, code):
    long = [*QUICK, "--set", "train.epochs=2000", "--set", "train.log_every=1"]
    command = [sys.executable, "-m", "hardmix", "run", "demo-mixup", *long, "--out", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.1)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "hardmix run --resume run" in err
    assert list((tmp_path / "run/checkpoints").glob("step-*"))
    assert not Path(tmp_path / "run/summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_comparison_keeps_checkpoints_leaves_no_workers_and_goes_on(tmp_path, signum, code):
    long = [*QUICK, "--set", "train.epochs=2000", "--set", "train.log_every=1", "--set", "train.checkpoint_every=1000"]
    command = [sys.executable, "-m", "hardmix", "compare", "demo-none", "demo-mixup", *long]
    process = subprocess.Popen(
        [*command, "--seeds", "2", "--jobs", "2", "--out", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    logs = [tmp_path / f"out/demo-{name}/seed-0/metrics.jsonl" for name in ("none", "mixup")]
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not all(log.is_file() and log.stat().st_size > 500 for log in logs):
        time.sleep(0.1)
    # A terminal sends Ctrl-C to the whole group, `kill` sends SIGTERM to one process.
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "the same command goes on" in err
    assert all(list(log.parent.glob("checkpoints/step-*")) for log in logs)
    assert not (tmp_path / "out/demo-none/seed-1").exists()
    group = ["pgrep", "-a", "-g", str(process.pid)]
    deadline = time.monotonic() + 20  # multiprocessing's own helper ends a moment after its parent
    while (left := subprocess.run(group, capture_output=True, text=True, check=False).stdout) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert not left


def test_demo_compares_images_numbers_and_texts(cli, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("hardmix.cli._compare", lambda names, seeds, out, *rest, **title: told.append((names[0], out)))
    assert cli("demo", "--out", str(tmp_path / "here"))[0] == 0
    here = [tmp_path / name for name in ("here", "here-numbers", "here-pairs")]
    assert told == list(zip(["demo-none", "diabetes-l1", "emoji-zero-shot"], here, strict=True))
    assert cli("demo", "--set", "train.epochs=1")[0] == 0
    assert [name for name, _ in told[3:]] == ["demo-none"]


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_sentence_told_once(cli, tmp_path):
    window = ["--set", "contrast.objective.window=1e-9", "--set", "contrast.epochs=2", "--set", "train.epochs=3"]
    code, _, err = cli("run", "diabetes-supremix", *window, "--set", "train.warmup_epochs=0", "--out", "numbers")
    assert code == 0, err
    assert err.count("a window above") == 1
    assert err.startswith("hardmix: supremix_loss: no row has another within the window")
    assert "UserWarning" not in err
