"""What a run can end with besides success. Light to import: the command line looks here before it loads the rest."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe or a command that can't be used; the message lists every mistake with its place."""


class RunError(RuntimeError):
    """A run that can't start or go on, in one sentence."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another kind."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Ctrl-C or SIGTERM: stopped between two steps, with a checkpoint. The message says how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message, signum)  # both, so that it survives the way back from another process
        self.message, self.signum = message, signum

    def __str__(self) -> str:
        return self.message
