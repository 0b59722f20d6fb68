"""The logs of a run: metrics.jsonl (same bytes for the same run), timing.jsonl, TensorBoard."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from hardmix.train.files import plain


class NoLog:
    """The log of a process that is not the first: one run has one log."""

    def metrics(self, record: dict[str, Any]) -> None:
        pass

    def timing(self, record: dict[str, Any]) -> None:
        pass

    def position(self, step: int) -> dict[str, int]:
        return {"step": step}

    def close(self) -> None:
        pass


class RunLog:
    """Appends one JSON object a line. `position` goes into checkpoints; resuming cuts the files back to it."""

    def __init__(self, folder: Path, position: dict[str, int] | None = None, *, tensorboard: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}
        for name in ("metrics", "timing"):
            path = folder / f"{name}.jsonl"
            keep = (position or {}).get(name, 0)
            with open(path, "ab") as file:
                file.truncate(min(keep, file.tell()))
            self._files[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._board: Any = None
        if tensorboard:
            try:
                self._board = board(folder / "tensorboard", (position or {}).get("step"))
            except OSError:
                self.close()
                raise

    def metrics(self, record: dict[str, Any]) -> None:
        """A deterministic record: kind, step, epoch and values."""
        self._write("metrics", record)
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, float) and key != "epoch":
                    self._board.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def timing(self, record: dict[str, Any]) -> None:
        self._write("timing", record)

    def position(self, step: int) -> dict[str, int]:
        """Where the files end now, flushed to the disk."""
        ends = {"step": step}
        if self._board is not None:
            self._board.flush()
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            ends[name] = file.tell()
        return ends

    def close(self) -> None:
        # What a full disk did not take is tried once more here; the run has ended with that already.
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(plain(record), allow_nan=False) + "\n")
        self._files[name].flush()


def board(folder: Path, purge_step: int | None) -> Any:
    """TensorBoard's writer, which hides what a resumed run writes again."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)
