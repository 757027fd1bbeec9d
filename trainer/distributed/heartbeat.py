"""Say of each rank what it is doing, in files that every host sees, and end a run in which a rank waits for ever.

A collective that waits does not say for whom. Each rank writes ``heartbeats/rank-00000.json`` in the run folder every
few seconds, from a thread of its own: where a rank is stopped or its host is gone, its file grows old; where it hangs,
its stage does. The rank whose stage has lasted too long reads all files, names the one that the others wait for, and
ends; the launcher then ends the others.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trainer.distributed.process_group import World

FOLDER = "heartbeats"
INTERVAL_SECONDS = 2.0
# A file that is so much older than the newest one is of a rank that no longer runs.
SILENT_SECONDS = 8.0
# In their order within a step. What one rank does alone while the others wait, such as hashing, may take any time.
STAGES = ("start", "data", "forward and backward", "reduce", "update", "save", "evaluate", "end")
UNBOUNDED = ("start", "save", "end")
HUNG_EXIT_CODE = 4


@dataclass(frozen=True, slots=True)
class Beat:
    """What one rank was doing when it last wrote.

    Attributes:
        rank: of it.
        host: that it runs on.
        pid: of its process.
        step: that it is making, from 1.
        stage: one of ``STAGES``.
        seconds: in this stage.
        age: of its file, in seconds, beside the newest one: clocks of hosts differ, those of one disk do not.
    """

    rank: int
    host: str
    pid: int
    step: int
    stage: str
    seconds: float
    age: float = 0.0

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: step and stage."""
        return self.step, STAGES.index(self.stage)

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host}), step {self.step}, {self.stage}"


class Heartbeat:
    """The heartbeat of this rank, and its watch over the others; a context.

    Args:
        run_dir: the run folder, which all ranks see.
        world: this process.
        timeout_seconds: that a stage may last; one in ``UNBOUNDED`` may last longer.
        on_hang: called with the verdict before the process ends.
    """

    def __init__(self, run_dir: Path, world: World, timeout_seconds: float, on_hang: Callable[[str], None]) -> None:
        self._folder, self._world = run_dir / FOLDER, world
        self._timeout, self._on_hang = timeout_seconds, on_hang
        self._now = (0, "start", time.monotonic())
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "verdict.txt").unlink(missing_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        if exception[0] is None and self._world.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def stage(self, name: str, step: int | None = None) -> None:
        """Say what this rank does from now on; the same again is progress, too. ``None``: it is the same step."""
        self._now = (self._now[0] if step is None else step, name, time.monotonic())

    def explain(self) -> str:
        """Name the rank that was lost, when a collective has failed; waits until a dead one's file is old enough."""
        limit = time.monotonic() + SILENT_SECONDS + 2 * INTERVAL_SECONDS
        while time.monotonic() < limit and not any(beat.age > SILENT_SECONDS for beat in self._read()):
            time.sleep(INTERVAL_SECONDS / 2)
        return verdict(self._read(), self._world.world_size)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._write()
            _, stage, since = self._now
            if time.monotonic() - since <= self._timeout or stage in UNBOUNDED:
                continue
            beats = self._read()
            if any(beat.age <= SILENT_SECONDS and beat.stage in UNBOUNDED for beat in beats):
                continue  # somebody is at work
            if self.gives_verdict():
                self._on_hang(verdict(beats, self._world.world_size))
            os._exit(HUNG_EXIT_CODE)

    def gives_verdict(self) -> bool:
        """Return whether no other rank has given the verdict."""
        try:
            (self._folder / "verdict.txt").open("x").close()
        except OSError:
            return False
        return True

    def _write(self) -> None:
        step, stage, since = self._now
        world = self._world
        beat = Beat(world.rank, socket.gethostname(), os.getpid(), step, stage, time.monotonic() - since)
        file = self._folder / f"rank-{world.rank:05d}.json"
        partial = file.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(asdict(beat)))
            partial.rename(file)
        except OSError:
            pass  # a disk that is full for a moment ends no run

    def _read(self) -> list[Beat]:
        found: list[tuple[float, dict[str, object]]] = []
        for file in sorted(self._folder.glob("rank-*.json")):
            try:
                found.append((file.stat().st_mtime, json.loads(file.read_text())))
            except (OSError, ValueError):
                continue
        newest = max((written for written, _ in found), default=0.0)
        return [Beat(**{**values, "age": newest - written}) for written, values in found]  # type: ignore[arg-type]


def verdict(beats: Sequence[Beat], world_size: int) -> str:
    """Name the rank that the others wait for, with host, step and stage.

    Args:
        beats: the last one of each rank that has written any.
        world_size: how many ranks there are.
    """
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    if missing:
        return f"rank {missing[0]} has never written: its process or its host did not start"
    silent = [beat for beat in beats if beat.age > SILENT_SECONDS]
    if silent:
        lost = max(silent, key=lambda beat: beat.age)
        return f"{lost}: no sign of it for {lost.age:.0f} s; its process was killed or stopped, or its host is gone"
    last = min(beats, key=lambda beat: (*beat.place, -beat.seconds))
    if all(beat.place == last.place for beat in beats):
        return f"all ranks wait in step {last.step}, {last.stage}, for {last.seconds:.0f} s: the network between them"
    return f"{last}: hangs there for {last.seconds:.0f} s, and the others wait for it"
