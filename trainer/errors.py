"""Define the errors that a user can fix, and the exit codes.

Each says four things: what was wrong, the value that was found, the reason and the hint. ``str(error)`` is the one line
(or, for many rows, the few lines) that the command line prints; a traceback is for our own mistakes only.
"""

from __future__ import annotations

from trainer.redaction import redact

INTERRUPTED_EXIT_CODE = 130  # what a shell says of a command that SIGINT has ended
LAUNCHER_PIDS = "AFINA_LAUNCHER_PIDS"  # variable of a process that is started for a run: who waits for it, by commas
TRIAL = "AFINA_TRIAL"  # variable of a run of a sweep or comparison: it tells the screen less
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL: the same command again resumes where this one was stopped


class AfinaError(Exception):
    """Base of every error that is shown to the user in plain words.

    Args:
        what: what was wrong, naming the key, file, line or row (``"method.r"``, ``"train.jsonl:12"``).
        value: the value that was found; left out of the message when ``None``.
        reason: why it cannot be used, as a full clause (``"must be at least 1"``).
        hint: what to type or change.
    """

    kind = "error"
    exit_code = 1
    rank: int | None = None
    """The rank that met it, when every rank raises it alike: that one alone reports it."""

    def __init__(self, what: str, *, value: object = None, reason: str = "", hint: str = "") -> None:
        self.what, self.value, self.reason, self.hint = what, value, reason, hint
        super().__init__(redact(self._message()))

    def _message(self) -> str:
        head = self.what if self.value is None else f"{self.what}={self.value}"
        parts = [f"{head}: {self.reason}" if self.reason else head]
        if self.hint:
            parts.append(f"→ {self.hint}")
        return " ".join(parts)


class ConfigError(AfinaError):
    """The configuration cannot be used as written. Nothing has been loaded or started. Exit code 2."""

    kind = "config"
    exit_code = 2


class NotSharedError(ConfigError):
    """Trials cannot be trained together on this model; each can be trained by itself. Exit code 2."""

    kind = "not shared"


class TooManyTrialsError(NotSharedError):
    """The adapters of so many trials do not fit on a device; those of fewer may. Exit code 2."""

    kind = "too many trials"


class DataError(AfinaError):
    """The data cannot be used as it is. Exit code 2: like a wrong key, it is found before anything is paid for."""

    kind = "data"
    exit_code = 2


class ModelError(AfinaError):
    """A model or tokenizer cannot be found, fetched or loaded. Exit code 2."""

    kind = "model"
    exit_code = 2


class CheckpointError(AfinaError):
    """A checkpoint, adapter or run folder cannot be read, or does not fit this run. Exit code 3."""

    kind = "checkpoint"
    exit_code = 3


class LaunchError(AfinaError):
    """Processes could not be started, or one of them died. Exit code 4."""

    kind = "launch"
    exit_code = 4


class TrainingError(AfinaError):
    """Training itself went wrong: a loss or gradient norm that is not finite, memory that has run out. Exit code 5."""

    kind = "training"
    exit_code = 5


class NotFiniteError(TrainingError):
    """A loss or gradient of a step is not finite; every rank raises it alike, and nothing of the step is left."""
