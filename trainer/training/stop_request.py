"""Remember a request to stop: the loop finishes the step, saves and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from trainer.distributed.process_group import World, sum_over_ranks
from trainer.errors import LAUNCHER_PIDS
from trainer.tracking.files import STOP_FILE

LOOK_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopRequested(Exception):
    """Raised on every rank between two batches of an evaluation: what is being scored can be scored again."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP (a closed terminal), by a file ``STOP`` in a run folder, and
    by the death of what has started this process: nobody would wait for it any more, nor could stop it.

    The loop shares it with all ranks in its own small all-reduce, so that all stop after the same step. torchrun sends
    SIGTERM twice, so a second one changes nothing; a second Ctrl-C means now.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._files: tuple[Path, ...] = ()
        self._looked = 0.0
        self._is_training = False
        # A shell that leaves a run behind is no launcher: torchrun's agent and ours say who they are.
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._launchers = [int(pid) for pid in os.environ.get(LAUNCHER_PIDS, "").split(",") if pid.isdigit()]

    def begin(self, *stop_files: Path) -> None:
        """From now on there is something to save, and who looks at ``wanted``.

        Args:
            stop_files: each asks to stop where it appears, and is taken away then; none: another rank looks for them.
        """
        self._files, self._is_training = stop_files, True

    def install(self) -> StopRequest:
        """Take over the signals of this process; of another thread than its main one, none can be."""
        for number in _SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background shells ignore some on purpose
                signal.signal(number, self._handle)
        if self._agent is not None or self._launchers:
            threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()
        return self

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @property
    def wanted(self) -> bool:
        """Whether to stop."""
        now = time.monotonic()
        if self.name is None and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._look()
        return self.name is not None

    def raise_if_any(self, world: World) -> None:
        """Raise on every rank where any was asked to stop. A collective.

        Raises:
            StopRequested: one was.
        """
        (stops,) = sum_over_ranks([float(self.wanted)], world.device)
        if stops:
            raise StopRequested

    def _look(self) -> None:
        for file in self._files:
            if file.exists():
                file.unlink(missing_ok=True)
                self.name = STOP_FILE

    def _watch_launcher(self) -> None:
        while self._has_launcher():
            time.sleep(LOOK_SECONDS)
        self.name = self.name or "the launcher has died"
        if not self._is_training:  # perhaps waiting, for ever, to meet ranks that are gone
            os._exit(128 + signal.SIGTERM)

    def _has_launcher(self) -> bool:
        is_orphan = self._agent is not None and os.getppid() != self._agent
        return not is_orphan and all(map(_is_there, self._launchers))


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
