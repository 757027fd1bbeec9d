"""Say of each rank what it is doing, in files that every host sees, and end a run in which a rank waits for ever.

A collective that waits does not say for whom. Each rank writes ``heartbeats/rank-00000.json`` in the run folder at each
stage of a step, and every few seconds from a thread of its own: where a rank is stopped or its host is gone, its file
grows old; where it hangs, its stage does. The rank whose stage has lasted too long reads all files, names the one that
the others wait for, and ends; the others see its verdict and end too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from trainer.compat.torch import dump_collectives
from trainer.distributed.process_group import World, barrier
from trainer.distributed.verdict import SILENT_SECONDS, UNBOUNDED, Beat, process_space, verdict

FOLDER = "heartbeats"
VERDICT_FILE = "verdict.txt"
INTERVAL_SECONDS = 2.0
# What the main thread has, after the verdict of another rank, to end by itself; closing W&B may take half of it.
GRACE_SECONDS = 40.0
RECORD_BYTES = 4096  # of a beat, padded: it is written in place
MAX_FAILURE = 500  # characters, of six bytes at most
HUNG_EXIT_CODE = 4


def clear_heartbeats(run_dir: Path, world: World) -> None:
    """Delete what an earlier life of the run has left, on rank 0. A collective: a verdict of this life must not be
    taken for one of an earlier one."""
    if world.is_main:
        shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    barrier()


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
        # Seconds are counted in beats: a job that is suspended with all its processes comes back without a timeout.
        self._beats = 0
        self._now = (0, "start", 0)
        self._failure: str | None = None
        self._process = socket.gethostname(), os.getpid(), process_space()
        self._has_given_verdict = False
        self._file: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if exception[0] is None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # a rank that has ended well is not lost
            if self._world.is_main:
                shutil.rmtree(self._folder, ignore_errors=True)

    def stage(self, name: str, step: int | None = None) -> None:
        """Say what this rank does from now on; the same again is progress, too. ``None``: it is the same step."""
        self._now = (self._now[0] if step is None else step, name, self._beats)
        if self._file is not None:  # kept open: other processes of this host see it at once, at the cost of a write
            with contextlib.suppress(OSError):
                os.pwrite(self._file, self._record(), 0)

    def failed(self, failure: str) -> Beat:
        """Say what this rank fails with, for the others; returns where it was."""
        self._failure = failure[:MAX_FAILURE]
        self._write()
        return self._beat()

    def explain(self) -> str:
        """Name the rank that was lost, when a collective has failed; waits until that can be seen."""
        limit = time.monotonic() + SILENT_SECONDS + 2 * INTERVAL_SECONDS
        while time.monotonic() < limit and not any(beat.failure or beat.lost() for beat in self._read()):
            time.sleep(INTERVAL_SECONDS / 4)
        return verdict(self._read(), self._world.world_size)

    def gives_verdict(self) -> bool:
        """Return whether no other rank has given the verdict."""
        try:
            (self._folder / VERDICT_FILE).open("x").close()
        except OSError:
            return False
        self._has_given_verdict = True
        return True

    def dump(self) -> str:
        """Write what torch's flight recorder knows of this rank's last collectives; returns where to look, or ''."""
        file = self._folder / f"flight-recorder-{self._world.rank}"
        try:
            recorded = dump_collectives()
            if recorded:
                file.write_bytes(recorded)
        except (OSError, RuntimeError):
            return ""
        return f"; the last collectives: {file.parent}/flight-recorder-*" if recorded else ""

    def _watch(self) -> None:
        grace = GRACE_SECONDS
        while not self._done.wait(INTERVAL_SECONDS):
            self._beats += 1
            self._write()
            if self._has_given_verdict:
                continue
            if (self._folder / VERDICT_FILE).exists():
                grace -= INTERVAL_SECONDS
                if grace <= 0 and not self._done.is_set():
                    self.dump()
                    os._exit(HUNG_EXIT_CODE)
                continue
            if self._world.world_size == 1 or self._seconds() <= self._timeout:
                continue  # of one rank nobody waits
            beats = self._read()
            is_lost = any(beat.lost() for beat in beats)
            if not is_lost and any(beat.stage in UNBOUNDED for beat in beats):
                continue  # somebody is at work, perhaps this rank; not where it waits for one that is gone
            found = self.dump()
            if self.gives_verdict():
                self._on_hang(verdict(beats, self._world.world_size) + found)
            os._exit(HUNG_EXIT_CODE)

    def _seconds(self) -> float:
        """How long this stage has lasted."""
        return (self._beats - self._now[2]) * INTERVAL_SECONDS

    def _beat(self) -> Beat:
        (step, stage, _), world = self._now, self._world
        return Beat(world.rank, *self._process, step, stage, self._seconds(), self._failure)

    @property
    def _path(self) -> Path:
        return self._folder / f"rank-{self._world.rank:05d}.json"

    def _record(self) -> bytes:
        return json.dumps(asdict(self._beat())).encode().ljust(RECORD_BYTES)

    def _write(self) -> None:
        """Write, and close: that is when hosts that share the folder see it."""
        with contextlib.suppress(OSError):  # a disk that is full for a moment ends no run
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT)
            try:
                os.pwrite(file, self._record(), 0)
            finally:
                os.close(file)

    def _read(self) -> list[Beat]:
        found: list[tuple[float, dict[str, object]]] = []
        for file in sorted(self._folder.glob("rank-*.json")):
            try:
                with file.open() as beat:  # opened first: that is when NFS asks its server how old the file is
                    found.append((os.fstat(beat.fileno()).st_mtime, json.loads(beat.read())))
            except (OSError, ValueError):
                continue
        newest = max((written for written, _ in found), default=0.0)
        return [Beat(**{**values, "age": newest - written}) for written, values in found]  # type: ignore[arg-type]
