"""Two real processes (gloo): gradients, evaluation, plans, one log, stopping and resuming."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hardmix.train.loop import run_recipe

from ..train.conftest import fingerprint, tiny

ROOT = Path(__file__).parents[2]
VIT = {"name": "tiny-vit", "options": {"dim": 16, "depth": 3, "heads": 2, "patch": 4}}

#: threads of the group that are still there when the interpreter ends may abort it
LEAVE = ("from hardmix.distributed import leave", "leave()")


def launch(folder: Path, body: str, ranks: int = 2, wait: bool = True) -> subprocess.Popen:
    """Run a Python body on `ranks` processes under torchrun."""
    script = folder / "body.py"
    lines = [
        "import sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        "import torch",
        "torch.set_num_threads(1)",
        body,
        *LEAVE,
    ]
    script.write_text("\n".join(lines) + "\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    return process


@pytest.mark.slow
def test_two_ranks_train_like_one_process_on_the_same_global_batch(tmp_path):
    """No mixing and no augmentation, so that both see the same batch: weights agree after each of 10 steps."""
    sections = {
        "policy": None,
        "objective": {"name": "soft-cross-entropy"},
        "model": VIT,
        "data": {"name": "digits", "train_samples": 200, "validation": 0.2, "augment": []},
        "train": {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "batch_size": 25, "epochs": 2},
    }
    run_recipe(tiny(**sections), tmp_path / "one")
    launch(
        tmp_path,
        f"""
from pathlib import Path
from hardmix.train.loop import run_recipe
from tests.train.conftest import tiny
run_recipe(tiny(**{sections!r}), Path({str(tmp_path / "two")!r}))
""",
    )
    from safetensors.torch import load_file

    one, two = (
        load_file(sorted((tmp_path / n / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
        for n in ("one", "two")
    )
    start = tiny(**sections).train.lr
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=1e-6 * max(1.0, start * 12)), key
    first, second = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert first["test"]["top1"] == second["test"]["top1"]
    assert first["test"]["nll"] == pytest.approx(second["test"]["nll"], abs=1e-6)
    assert first["test"]["cutmix_both"] == second["test"]["cutmix_both"]
    assert sum(second["reliability"]["count"]) == second["data"]["test"]
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], abs=1e-5) for key in a if isinstance(a[key], float)), (a, b)


@pytest.mark.slow
def test_plans_differ_between_ranks_and_repeat_between_runs_and_a_stopped_run_resumes(tmp_path):
    body = """
import os
from pathlib import Path
import hardmix.train.tasks.classification as task
from hardmix.train.loop import run_recipe
from tests.train.conftest import tiny
rank, seen = os.environ["RANK"], []
build = task.build_policy
def watched(*args):
    policy = build(*args)
    plan = policy.plan
    def remember(*args, **kwargs):
        made = plan(*args, **kwargs)
        seen.append([round(v, 6) for v in made.lam.tolist()])
        return made
    policy.plan = remember
    return policy
task.build_policy = watched
folder = Path({folder!r})
run_recipe(tiny(), folder)
Path({folder!r} + "-" + rank + ".txt").write_text(repr(seen))
"""
    for name in ("a", "b"):
        launch(tmp_path, body.format(folder=str(tmp_path / name)))
    plans = {(n, r): (tmp_path / f"{n}-{r}.txt").read_text() for n in "ab" for r in "01"}
    assert len(plans["a", "0"]) > 100
    assert plans["a", "0"] != plans["a", "1"]
    assert plans["a", "0"] == plans["b", "0"]
    assert plans["a", "1"] == plans["b", "1"]
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux")
@pytest.mark.skipif(torch.__version__ < "2.7", reason="its threads have no names before torch 2.7")
def test_no_thread_of_the_group_is_left_after_a_run(tmp_path):
    body = f"""
import os
from pathlib import Path
from hardmix.distributed import leave
from hardmix.train.loop import run_recipe
from tests.train.conftest import tiny
def threads():
    tasks = Path("/proc/self/task")
    return [name for task in tasks.iterdir() if "gloo" in (name := (task / "comm").read_text())]
run_recipe(tiny(train={{"epochs": 1}}), Path({str(tmp_path / "run")!r}))
assert threads()
leave()
assert not threads(), threads()
"""
    launch(tmp_path, body)


@pytest.mark.slow
def test_both_ranks_stop_together_and_the_run_resumes(tmp_path):
    body = f"""
from pathlib import Path
from hardmix.train.errors import Interrupted
from hardmix.train.loop import run_recipe
from tests.train.conftest import tiny
try:
    recipe = tiny(train={{"epochs": 3000, "checkpoint_every": 1000, "log_every": 1}})
    run_recipe(recipe, Path({str(tmp_path / "run")!r}))
except Interrupted as stopped:
    print(stopped)
"""
    process = launch(tmp_path, body, wait=False)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.stat().st_size > 500):
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[1]), signal.SIGTERM)  # one rank only: the other must follow
    out, _ = process.communicate(timeout=60)
    assert out.count("stopped at") == 2, out
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_two_ranks_stopped_within_an_epoch_end_with_the_same_bytes(tmp_path):
    """Also a line of the log that the stop cuts in two, to which each rank has its part."""
    body = f"""
import json, os, signal
from pathlib import Path
from hardmix.train.errors import Interrupted
from hardmix.train.loop import run_recipe
from hardmix.train.tasks.classification import Classification
from tests.train.conftest import tiny
whole, cut = (Path({str(tmp_path)!r}) / name for name in ("whole", "cut"))
recipe = tiny(train={{"log_every": 4}})
run_recipe(recipe, whole)
loss, steps = Classification.loss, []
def stops(self, *rest):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, *rest)
Classification.loss = stops
try:
    run_recipe(recipe, cut)
except Interrupted as stopped:
    print(stopped)
Classification.loss = loss
if os.environ["RANK"] == "0":  # which writes it
    sums = json.loads((cut / "checkpoints/step-00000003/state.json").read_text())["sums"]
    assert sums.keys() == {{"loss", "accuracy"}} and len(set(sums["loss"])) == 2
run_recipe(recipe, cut, resume=True)
"""
    process = launch(tmp_path, body, wait=False)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert out.count("stopped at step 3;") == 2, out
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "cut")


@pytest.mark.slow
def test_a_rank_that_fails_is_the_one_that_is_heard(tmp_path):
    body = f"""
import os
from hardmix.cli import main
from hardmix.train.errors import RunError
from hardmix.train.tasks.classification import Classification
loss, steps = Classification.loss, []
def fails(self, *rest):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 2:  # a step has been made, so there is a bar
        raise RunError("the loss is nan at step 2; samples: train/17.")
    return loss(self, *rest)
Classification.loss = fails
sys.argv = ["hardmix", "run", "digits-cutmix-dm", "--smoke", "--out", {str(tmp_path / "run")!r}]
main()
"""
    process = launch(tmp_path, body, wait=False)
    out, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "hardmix, rank 1: the loss is nan at step 2; samples: train/17." in out
    assert "rank 0: another process ended (" in out
    assert "hardmix/cli.py" not in out, "no traceback of ours"
    assert out.count("digits-cutmix-dm") == 1, "one bar, that of the first rank"
    assert "the loss is nan at step 2; samples: train/17." in out.split("Root Cause")[1]


@pytest.mark.slow
def test_accelerate_launch_trains_and_says_that_a_cpu_gets_one_process(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "hardmix", "run", "digits-cutmix-dm", "--smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchrun --nproc-per-node N -m hardmix run" in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_two_ranks_train_a_table_like_one_process(tmp_path):
    sections = {"train": {"optimizer": "sgd", "epochs": 3, "lr": 0.01}}
    small_regression = "from tests.train.test_regression import small"
    launch(
        tmp_path,
        f"""
from pathlib import Path
from hardmix.train.loop import run_recipe
{small_regression}
run_recipe(small(**{sections!r}), Path({str(tmp_path / "two")!r}))
""",
    )
    from train.test_regression import small

    run_recipe(small(**sections), tmp_path / "one")
    one, two = (json.loads((tmp_path / n / "summary.json").read_text())["test"] for n in ("one", "two"))
    assert two["mae"] == pytest.approx(one["mae"], rel=1e-5)
    assert two["ordinality"] == pytest.approx(one["ordinality"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True], ids=["before the head", "beside the head"])
def test_a_contrast_on_two_ranks_compares_the_samples_of_both(beside, tmp_path):
    """Odd batches, so that the ranks' parts differ in size; mixtures drawn alike; no noise, which ranks draw apart."""
    stages = {"epochs": 0, "weight": 0.5} if beside else {"epochs": 3}
    contrast = {**stages, "noise": 0.0, "objective": {"name": "supremix", "window": 0.5}}
    train = {"optimizer": "sgd", "epochs": 5, "lr": 0.01, "batch_size": 31}
    sections = {"contrast": contrast, "train": train}
    launch(
        tmp_path,
        f"""
from pathlib import Path
from hardmix.train.loop import run_recipe
from tests.train.test_regression import small
run_recipe(small(**{sections!r}), Path({str(tmp_path / "two")!r}))
""",
    )
    from safetensors.torch import load_file

    from train.test_regression import small

    run_recipe(small(**sections), tmp_path / "one")
    one, two = (
        load_file(sorted((tmp_path / n / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
        for n in ("one", "two")
    )
    fresh = load_file(sorted((tmp_path / "one/checkpoints").glob("step-*"))[0] / "model.safetensors")
    assert max(float((one[key] - fresh[key]).abs().max()) for key in one) > 1e-3
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=1e-6), key
    logs = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    for a, b in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        key = next(key for key in ("contrast", "loss", "mae") if key in a)
        assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_learn_from_few_labels_with_one_log_and_one_split(tmp_path):
    launch(
        tmp_path,
        f"""
from pathlib import Path
from hardmix.train.loop import run_recipe
from tests.train.test_few_labels import recipe
plan = recipe(
    semi={{"algorithm": {{"name": "flexmatch"}}}},
    policy={{"name": "mixup"}},
    objective={{"name": "decoupled-mixup", "asymmetric": True}},
)
run_recipe(plan, Path({str(tmp_path / "two")!r}))
""",
    )
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["objective"] == "flexmatch + decoupled-mixup"
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert (tmp_path / "two" / "split.json").is_file()


@pytest.mark.slow
def test_a_learnt_policy_is_the_same_on_two_ranks(tmp_path):
    launch(
        tmp_path,
        f"""
import os
from pathlib import Path
import hardmix.train.loop as loop
from tests.train.test_policies import recipe
kept = []
class Run(loop._Run):
    def __init__(self, *args):
        super().__init__(*args)
        kept.append(self.task.policy)
loop._Run = Run
loop.run_recipe(recipe("automix"), Path({str(tmp_path / "run")!r}))
torch.save(kept[0].state_dict(), Path({str(tmp_path)!r}) / f"policy-{{os.environ['RANK']}}.pt")
""",
    )
    one, two = (torch.load(tmp_path / f"policy-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
