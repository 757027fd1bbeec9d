"""Name the rank that the others wait for, from what each of them last said that it does."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A file that is so much older than the newest one is of a rank that no longer runs.
SILENT_SECONDS = 8.0
# In their order within a step. What one rank does alone while the others wait, such as hashing, may take any time.
STAGES = ("start", "data", "forward and backward", "reduce", "update", "save", "evaluate", "end")
UNBOUNDED = ("start", "save", "end")
GONE, STOPPED = "was killed, or ended without a word", "is stopped"


@dataclass(frozen=True, slots=True)
class Beat:
    """What one rank was doing when it last wrote.

    Attributes:
        rank: of it.
        host: that it runs on.
        pid: of its process.
        processes: whose numbers ``pid`` is one of (:func:`process_space`).
        step: that it is making, from 1.
        stage: one of ``STAGES``.
        seconds: in this stage.
        failure: what it fails with.
        age: of its file, in seconds, beside the newest one: clocks of hosts differ, those of one disk do not.
    """

    rank: int
    host: str
    pid: int
    processes: str
    step: int
    stage: str
    seconds: float
    failure: str | None = None
    age: float = 0.0

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: step and stage."""
        return self.step, STAGES.index(self.stage)

    def lost(self) -> str | None:
        """Say what became of its process, where that can be seen from here; ``None`` where it runs."""
        if self.processes == process_space() and (state := process_state(self.pid)) is not None:
            return f"its process {state}"
        if self.age > SILENT_SECONDS:
            return f"no sign of it for {self.age:.0f} s: its process was killed or stopped, or its host is gone"
        return None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step}, {self.stage}"


def verdict(beats: Sequence[Beat], world_size: int) -> str:
    """Name the rank that the others wait for, with host, step and stage.

    Args:
        beats: the last one of each rank that has written any.
        world_size: how many ranks there are.
    """
    failed = [beat for beat in beats if beat.failure]
    if failed:
        first = max(failed, key=lambda beat: beat.age)
        return f"{first}: {first.failure}"
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    if missing:
        return f"rank {missing[0]} has never written: its process or its host did not start"
    lost = [beat for beat in beats if beat.lost()]
    if lost:
        first = max(lost, key=lambda beat: beat.age)
        return f"{first}: {first.lost()}"
    last = min(beats, key=lambda beat: (*beat.place, -beat.seconds))
    if all(beat.place == last.place for beat in beats):
        return f"all ranks wait in step {last.step}, {last.stage}, for {last.seconds:.0f} s: the network between them"
    return f"{last}: hangs there for {last.seconds:.0f} s, and the others wait for it"


def process_space() -> str:
    """Return what tells whether two processes number processes alike: the host, and the container on it."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_state(pid: int) -> str | None:
    """Return ``GONE`` or ``STOPPED`` of a process of this host; ``None`` where it runs, or cannot be seen."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return GONE
    except (OSError, IndexError):
        return None
    return {"Z": GONE, "X": GONE, "T": STOPPED, "t": STOPPED}.get(state)
