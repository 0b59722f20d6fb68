"""The training loop: settings, set-up, one loop over steps. Whoever needs another loop copies this one.

Devices, precision and processes are Accelerate's. Every random number is a function of the seed and the step
(`hardmix.train.seeds`), so a checkpoint holds no generator and a killed run resumes bit-exactly.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hardmix import __version__
from hardmix.distributed import (
    average_gradients,
    from_first,
    largest,
    mean_over_ranks,
    my_part,
    of_every_rank,
    rows_from_first,
)
from hardmix.train.device import COMPILING_STEPS, compiled, compiling, device_name, make_accelerator, peak_memory_mb
from hardmix.train.errors import Interrupted, RunError
from hardmix.train.few_data import on_own_split
from hardmix.train.files import new_folder, only_writer, write_json, write_text
from hardmix.train.finite import not_finite_output, not_finite_weight
from hardmix.train.log import NoLog, RunLog
from hardmix.train.optimizer import build_optimizer
from hardmix.train.recipe import Recipe
from hardmix.train.run_folder import check_origin, first_files, problem_with, read_summary
from hardmix.train.schedule import Schedule
from hardmix.train.seeds import derive, generator
from hardmix.train.start import prepare_start
from hardmix.train.state import (
    clean_leftovers,
    flatten_optimizer,
    list_steps,
    load_checkpoint,
    mark_best,
    match_shapes,
    save_checkpoint,
    unflatten_optimizer,
)
from hardmix.train.stop import Stop, ends_at_signal, leave_signals_to_parent, stop_signals
from hardmix.train.tasks import TASKS
from hardmix.train.tasks.classification import Classification
from hardmix.train.tasks.image_text import ImageText

#: called a few times a second with {"step", "steps", "epoch", "epochs", "images_per_s"} and what the task logs: "loss",
#: "contrast", and "accuracy" where there is one
Progress = Callable[[dict[str, Any]], None]


def run_recipe(
    recipe: Recipe, folder: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Train one recipe into `folder` and return its summary.

    Args:
        recipe: resolved recipe.
        folder: run folder; created. A folder that already holds a run is only touched with `resume`.
        resume: go on from the last checkpoint, or return the summary of a finished run.
        progress: told about the run a few times a second.

    Raises:
        RunError: the folder holds another run, another process trains into it, it can't be written into, its summary is
            damaged, or the loss is not finite.
        RecipeError: fp16 on a CPU.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    accelerator = make_accelerator(recipe)
    first = accelerator.is_main_process
    if problem := from_first(problem_with(recipe, folder, resume) if first else None):
        raise RunError(problem)
    # A run that has begun keeps what it started from; a captioner needs the tokenizer to be built at all.
    begun = (folder / "summary.json").is_file() or (list_steps(folder / "checkpoints") and recipe.model.name != "coca")
    if recipe.tune.start and not from_first(bool(begun)):
        prepare_start(recipe, progress)  # by all processes together, with an accelerator of its own
        accelerator = make_accelerator(recipe)
    with ExitStack() as stack:
        if first:
            with first_files(folder):
                stack.enter_context(new_folder(folder))
        if not from_first(stack.enter_context(only_writer(folder)) if first else None):
            raise RunError(f"another process trains into {folder}; wait for it, or choose another --out.")
        if first:
            with first_files(folder):
                clean_leftovers(folder)
                clean_leftovers(folder / "checkpoints")
        accelerator.wait_for_everyone()
        if (folder / "summary.json").is_file():
            if first and not (folder / "report.html").is_file():
                _write_report(folder)
            return read_summary(folder)
        if recipe.train.threads:
            # The next run of this process may leave them to torch, which would keep this number.
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(recipe.train.threads)
        run = _Run(recipe, folder, accelerator)
        stack.callback(run.log.close)
        with stop_signals() as stop:
            run.train(stop, progress)
        with ends_at_signal(f"stopped after the training; go on with: hardmix run --resume {folder}"):
            return run.finish()


def _write_report(folder: Path) -> None:
    from hardmix.report.page import write_run_report

    write_run_report(folder)


class _Run:
    """What one run holds while it trains."""

    def __init__(self, recipe: Recipe, folder: Path, accelerator: Any) -> None:
        self.recipe, self.folder, self.accelerator = recipe, folder, accelerator
        self.device = accelerator.device
        self.checkpoints = folder / "checkpoints"
        steps = list_steps(self.checkpoints)
        last = from_first(steps[-1] if steps else None)
        if largest(int(last is not None and last not in steps)):
            raise RunError(
                f"not every process sees the checkpoints in {folder}; put it on a disk that all of them share."
            )
        # Weights to start from are not needed by a run that has a checkpoint of its own.
        on = recipe if last is None else on_own_split(recipe, folder)
        self.task = TASKS[recipe.task](on, pretrained=last is None).to(self.device)
        if last is not None and isinstance(self.task, Classification):
            self.task.make_room(folder)
        if recipe.train.channels_last and self.task.layout is not None:
            self.task.model.to(memory_format=self.task.layout)  # type: ignore[call-overload]
        optimizer = build_optimizer(self.task.model, recipe, *self._beside())
        self.model, self.optimizer = self.accelerator.prepare(self.task.model, optimizer)
        #: what steps go through; what is measured and saved is the model itself, so a checkpoint fits both
        self.stepped = compiled(self.model, self.task.objective) if recipe.train.compile else self.model
        self.extra = self.task.modules()
        self.ema: AveragedModel | None = None
        if recipe.train.ema:
            average = get_ema_multi_avg_fn(recipe.train.ema)
            self.ema = AveragedModel(self._network(), multi_avg_fn=average, use_buffers=True)
        train = recipe.train
        self.schedule = Schedule(self.task.stages(), train.batch_size, train.warmup_epochs, train.decay)
        self.batch_size, self.steps = self.schedule.batch_size, self.schedule.steps
        self._check_parts()
        learns = any(True for _ in self.task.objective.parameters())
        if recipe.contrast is not None and learns and accelerator.num_processes > 1:
            raise RunError(
                f"{recipe.objective.name} learns its noise, which beside a contrast it can in one process only; set "
                "objective.learn_sigma=false, or start it without a launcher."
            )
        self.step, self.seconds = 0, 0.0
        #: of it, what steps took, reading their samples included: not evaluations, checkpoints and logs
        self.stepping = 0.0
        #: how many steps that were; those in which a process compiles are not counted
        self.timed = 0
        self.best, self.best_step = -math.inf, None  # type: float, int | None
        self.validation: dict[str, float] = {}
        # What was measured since the last line of the log; part of a checkpoint, so that resumed lines are the same.
        self.sums: dict[str, Any] = {}
        self.logged = 0
        position = None if last is None else self._restore(last)
        self.log: RunLog | NoLog = NoLog()
        if accelerator.is_main_process:
            with first_files(folder):
                write_text(folder / "recipe.toml", recipe.to_toml())
                # Killed between the checkpoint and the note which one is best: the checkpoint knows.
                if self.best_step is not None:
                    mark_best(self.checkpoints, self.best_step, self.best)
                if isinstance(self.task, Classification):
                    self.task.write_files(folder)
                self.log = RunLog(folder, position)

    def train(self, stop: Stop, progress: Progress | None) -> None:
        """Steps until the end, an evaluation and a checkpoint after each epoch."""
        started = time.perf_counter() - self.seconds
        told, rate = 0.0, 0.0
        first, since = self.step, time.perf_counter()
        counted_from = first + COMPILING_STEPS * self.recipe.train.compile
        asked = time.perf_counter()
        for step, index, raw in self._batches():
            with compiling(self.recipe):
                values = self._one_step(step, index, raw)
            self.step = step + 1
            if step >= counted_from:
                self.stepping += time.perf_counter() - asked
                self.timed += 1
            self.sums = {key: self.sums.get(key, 0.0) + value for key, value in values.items()}
            now = time.perf_counter()
            # A stage has its own losses, so no line of the log is about two.
            if self.step % self.recipe.train.log_every == 0 or self.step in self.schedule.ends:
                rate = (self.step - first) * self.batch_size / max(now - since, 1e-9)
                self._log_train(rate, now - started)
                first, since = self.step, time.perf_counter()
            if (
                progress is not None
                and self.accelerator.is_main_process
                and (now - told > 0.2 or self.step == self.steps)
            ):
                progress(self._progress(values, rate or (self.step - first) * self.batch_size / max(now - since, 1e-9)))
                told = now
            if self.schedule.epochs_done(self.step).is_integer():
                self._end_of_epoch(started)
            if signum := largest(stop.signum):
                self._save(started)
                message = f"stopped at step {self.step}; go on with: hardmix run --resume {self.folder}"
                raise Interrupted(message, signum)
            asked = time.perf_counter()
        if self.steps == 0:  # the weights that the run starts from are what it measures
            self._end_of_epoch(started)

    def finish(self) -> dict[str, Any]:
        """Measure the test split and write the summary, the gallery and the report."""
        step = self.step
        if self.recipe.eval.checkpoint == "best":
            best = self._load_weights("best")
            step, self.validation = best["step"], best["validation"]
        started = time.perf_counter()
        model = self._eval_model()
        with self.accelerator.autocast():
            result = self.task.test(model, self.device)
            if self.accelerator.is_main_process:
                with self._writing("the gallery"):
                    self.task.write_gallery(model, self.device, self.folder / "gallery.safetensors")
        recipe = self.recipe
        summary = {
            "name": recipe.name,
            "task": recipe.task,
            "seed": recipe.seed,
            "finished": True,
            **self.task.describe(),
            **result,
            "validation": self.validation,
            "checkpoint": {"which": recipe.eval.checkpoint, "step": step},
            "seconds": {
                "train": round(self.seconds, 3),
                "test": round(time.perf_counter() - started, 3),
                "per_step": self._step_seconds(),
            },
            "memory_mb": peak_memory_mb(self.device),
            "versions": {"hardmix": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "device": device_name(self.device),
        }
        if self.accelerator.is_main_process:
            with self._writing("the summary"):
                write_json(self.folder / "summary.json", summary)
                _write_report(self.folder)
        self.accelerator.wait_for_everyone()
        return summary

    def _step_seconds(self) -> float | None:
        """None for a run that makes no step: the time that it takes to start is not the cost of one."""
        if self.steps == 0:
            return None
        return round(self.stepping / self.timed if self.timed else self.seconds / self.steps, 6)

    def _batches(self) -> Iterator[tuple[int, Tensor, Any]]:
        """(step, sample numbers, raw batch) from the current step to the end; workers only read and decode."""
        from torch.utils.data import DataLoader

        while self.step < self.steps:
            at = self.schedule.place(self.step)
            self.task.start_epoch(at.stage, at.epoch)
            order = torch.randperm(
                self.schedule.stages[at.stage].samples, generator=generator(self.recipe.seed, "order", at.epoch)
            )
            groups = list(order.split(self.batch_size))[at.offset : self.schedule.steps_per_epoch[at.stage]]
            groups = [my_part(group) for group in groups]
            loader = DataLoader(
                _Batches(self.task.load),
                # As arrays, whose bytes go through the pipe to a worker: for a tensor it would open shared memory.
                sampler=[group.numpy() for group in groups],  # type: ignore[arg-type]
                batch_size=None,
                num_workers=self.recipe.data.workers,
                pin_memory=self.device.type == "cuda",
                generator=generator(self.recipe.seed, "workers", at.epoch),
                worker_init_fn=leave_signals_to_parent,
            )
            first = self.step
            for offset, (index, raw) in enumerate(zip(groups, loader, strict=True)):
                if isinstance(raw, Exception):
                    raise raw
                yield first + offset, index, raw

    def _one_step(self, step: int, index: Tensor, raw: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Forward, backward, one move of the optimizer. The loss is looked at before anything moves."""
        train, rank = self.recipe.train, self.accelerator.process_index
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr(step) * group.get("share", 1.0)
        self.task.start_step(step / self.steps, generator(self.recipe.seed, "contrast", step))
        torch.manual_seed(derive(self.recipe.seed, "dropout", step, rank))
        totals: dict[str, Tensor] = {}
        parts = min(train.accumulate, len(index))
        # A loss that compares the samples of a batch is not the mean of those of its parts.
        whole = self.task if parts > 1 and isinstance(self.task, ImageText) and self.task.compares else None
        for part, piece in enumerate(zip(*(tensor.tensor_split(1 if whole else parts) for tensor in raw), strict=True)):
            batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in piece)
            # Processes average their gradients: with this weight the average is the mean over the global batch.
            share = len(batch[0]) * self.accelerator.num_processes / self.batch_size
            draws = generator(self.recipe.seed, "mix", step, rank, part)
            with self.accelerator.autocast():
                if whole is not None:
                    loss, values = whole.loss_in_parts(self.model, batch, draws, parts, partial(self._scaled, share))
                else:
                    loss, values = self.task.loss(self.stepped, batch, draws)
            if not math.isfinite(loss.item()):
                draws = generator(self.recipe.seed, "mix", step, rank, part)
                again = partial(self.task.loss, self.model, batch, draws)
                raise RunError(self._not_finite(step, index, batch[0], loss.item(), again))
            if whole is None:
                self.accelerator.backward(loss * share)
            totals = {k: totals[k] + v * share if k in totals else v * share for k, v in values.items()}
        if (beside := self._beside()[0]) is not None:
            average_gradients(beside.parameters())
        if train.clip_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), train.clip_norm)
            if learnt := [] if beside is None else [p for p in beside.parameters() if p.requires_grad]:
                # By itself, so that neither scales the other's step; fp16's scale was taken off all gradients above.
                nn.utils.clip_grad_norm_(learnt, train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self._network())
        if isinstance(self.task, Classification):
            self.task.end_step()
        return totals

    def _check_parts(self) -> None:
        """What each process has of each part of a batch: a sample, or two where they are mixed with one another."""
        processes, parts = self.accelerator.num_processes, self.recipe.train.accumulate
        mixed = self.recipe.policy is not None and self.recipe.policy.name != "augmix"
        mixed = mixed and self.recipe.task != "few-labels"  # there it is with unlabelled ones
        smallest = processes * parts * (2 if mixed else 1)
        if self.batch_size < smallest:
            raise RunError(
                f"train.batch_size is {self.batch_size}, but {processes} process{'es' * (processes > 1)} x {parts} "
                f"part{'s' * (parts > 1)}{' of two samples to mix' * mixed} need at least {smallest}; make it larger."
            )

    def _beside(self) -> tuple[nn.Module | None, dict[nn.Parameter, float]]:
        """What is trained besides the model, and parameters that move at a rate of their own."""
        task = self.task
        return (task.policy, task.rates()) if isinstance(task, Classification) else (None, {})

    def _network(self) -> nn.Module:
        """What is averaged and measured."""
        return self.task.network if isinstance(self.task, Classification) else self.task.model

    def _scaled(self, share: float, loss: Tensor) -> Tensor:
        """What `Accelerator.backward` would go back from."""
        scaler = self.accelerator.scaler
        return loss * share if scaler is None else scaler.scale(loss * share)

    def _not_finite(self, step: int, index: Tensor, data: Tensor, loss: float, again: Callable[[], object]) -> str:
        """Who is to blame: the images, the weights, a layer, or the loss itself. `again` is the forward once more."""
        names = self.task.names(index)
        ids = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        model = self.accelerator.unwrap_model(self.model)
        if data.is_floating_point() and not bool(torch.isfinite(data).all()):
            culprit = "the data of this batch"
        elif name := not_finite_weight(model):
            culprit = f"the weights {name}"
        elif name := not_finite_output(model, again):
            culprit = f"the output of {name} (try a lower train.lr or train.clip_norm)"
        else:
            culprit = "the loss itself (try a lower train.lr or train.clip_norm)"
        return (
            f"the loss is {loss} at step {step + 1}; the first tensor that is not finite is {culprit}; samples: {ids}."
        )

    def _end_of_epoch(self, started: float) -> None:
        epoch = round(self.schedule.epochs_done(self.step))
        last = self.step == self.steps
        improved = False
        self._agree()
        self.task.end_epoch(self.accelerator.unwrap_model(self.model), self.device)
        if last or epoch % self.recipe.eval.every == 0:
            model = self._eval_model()
            if name := not_finite_weight(model):
                raise RunError(
                    f"the weights {name} are not finite after step {self.step}, so there is nothing to measure; try a "
                    "lower train.lr or train.clip_norm."
                )
            with self.accelerator.autocast():
                self.validation = self.task.validate(model, self.device)
            if self.validation:
                with self._writing("the log"):
                    self.log.metrics(
                        {"kind": "validation", "step": self.step, "epoch": float(epoch), **self.validation}
                    )
                score = self.validation.get(self.task.score)
                if improved := score is not None and self.task.sign * score > self.best:
                    self.best, self.best_step = self.task.sign * score, self.step
        if last or improved or epoch % self.recipe.train.checkpoint_every == 0:
            self._save(started)

    def _agree(self) -> None:
        """What batch norms track is each process's own; all go on with that of the first, which checkpoints hold."""
        if self.accelerator.num_processes > 1:
            beside = self._beside()[0]
            for module in (self.task.model, *(m for m in (self.ema, beside) if m is not None)):
                for buffer in module.buffers():
                    buffer.copy_(rows_from_first(buffer))

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """A full disk or a lost permission ends the run in a sentence that names the last good checkpoint."""
        try:
            yield
        except OSError as error:
            steps = list_steps(self.checkpoints)
            last = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no checkpoint yet"
            raise RunError(
                f"{what} of step {self.step} could not be written ({error.strerror or error}); {last}: make room or "
                f"mend the permissions, then go on with: hardmix run --resume {self.folder}"
            ) from None

    def _log_train(self, rate: float, seconds: float) -> None:
        sums = mean_over_ranks(self.sums)
        values = {key: value.item() / (self.step - self.logged) for key, value in sums.items()}
        self.sums, self.logged = {}, self.step
        epoch = round(self.schedule.epochs_done(self.step), 4)
        lr = float(self.optimizer.param_groups[0]["lr"])
        with self._writing("the log"):
            self.log.metrics({"kind": "train", "step": self.step, "epoch": epoch, **values, "lr": lr})
            self.log.timing({"step": self.step, "images_per_s": round(rate, 1), "seconds": round(seconds, 3)})

    def _progress(self, values: dict[str, Tensor], rate: float) -> dict[str, Any]:
        now = {key: value.item() for key, value in values.items()}
        epochs = self.schedule.epochs
        epoch = min(int(self.schedule.epochs_done(self.step)) + 1, epochs)
        return {"step": self.step, "steps": self.steps, "epoch": epoch, "epochs": epochs, "images_per_s": rate, **now}

    def _eval_model(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema
        return model.eval()

    def _save(self, started: float) -> None:
        self.seconds = time.perf_counter() - started
        sums = of_every_rank(self.sums)
        if not self.accelerator.is_main_process:
            return
        with self._writing("the log"):
            position = self.log.position(self.step)
        tensors = {"model": self.accelerator.unwrap_model(self.model).state_dict()}
        tensors["optimizer"], rest = flatten_optimizer(self.optimizer.state_dict())
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        for name, module in self.extra.items():
            if module.state_dict():
                tensors[name] = module.state_dict()
        state = {
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "processes": self.accelerator.num_processes,
            "optimizer": rest,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "best": None if self.best_step is None else {"step": self.best_step, "score": self.best},
            "validation": self.validation,
            "seconds": self.seconds,
            "stepping": self.stepping,
            "timed": self.timed,
            "log": position,
            "sums": sums,
            "logged": self.logged,
        }
        keep = [] if self.best_step is None else [self.best_step]
        with self._writing("the checkpoint"):
            save_checkpoint(self.checkpoints, self.step, tensors, state, keep=keep)
            if self.best_step == self.step:
                mark_best(self.checkpoints, self.step, self.best)

    def _restore(self, step: int) -> dict[str, int]:
        """Go to the checkpoint of a step. Returns where the logs ended then."""
        state = self._load_weights(step)
        self.step = state["step"]
        if state["best"] is not None:
            self.best, self.best_step = state["best"]["score"], state["best"]["step"]
        self.validation, self.seconds = state["validation"], state["seconds"]
        self.stepping = state.get("stepping", self.seconds)  # checkpoints of an older version hold the whole time
        self.timed = state.get("timed", self.step)
        self.sums = {key: torch.tensor(self._own(value), device=self.device) for key, value in state["sums"].items()}
        self.logged = state["logged"]
        return state["log"]

    def _own(self, values: list[float] | float) -> float:
        """This process' part of what a checkpoint holds of all; their mean where they are others, or were saved so."""
        values = values if isinstance(values, list) else [values]  # a number in checkpoints of an older version
        several = len(values) == self.accelerator.num_processes
        return values[self.accelerator.process_index] if several else sum(values) / len(values)

    def _load_weights(self, which: str | int) -> dict[str, Any]:
        saved = load_checkpoint(self.checkpoints, which)
        check_origin(saved, self.recipe, self.accelerator)
        model = self.accelerator.unwrap_model(self.model)
        match_shapes("resume", model, saved.tensors["model"])
        model.load_state_dict(saved.tensors["model"])
        self.optimizer.load_state_dict(unflatten_optimizer(saved.tensors["optimizer"], saved.state["optimizer"]))
        if self.ema is not None:
            self.ema.load_state_dict(saved.tensors["ema"])
        for name, module in self.extra.items():
            if name in saved.tensors:
                module.load_state_dict(saved.tensors[name])
        if self.accelerator.scaler is not None and saved.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        return saved.state


class _Batches(torch.utils.data.Dataset):
    """Hands whole batches of sample numbers to the task, so that in-memory data is indexed once per batch."""

    def __init__(self, load: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.load = load

    def __getitem__(self, index: np.ndarray) -> tuple[Tensor, ...] | Exception:
        try:
            return self.load(torch.from_numpy(index))
        except (ValueError, RuntimeError, OSError) as error:
            # A worker would hand over its traceback as the message.
            return error
