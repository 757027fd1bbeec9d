"""Run a command to its end, with its wall time and the peak memory of its whole process tree."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.25
# To count pages takes time of a core, the longer the more there are: four times a second made eight runs of 2 GiB one
# after the other an eighth slower, and one process of 3 GiB a fifth (2 cores). So a pause is at least so many times as
# long as a sample.
PAUSES = 50


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took.

    Attributes:
        seconds: wall time, from its start to its end.
        peak_bytes: the largest sum, over its processes, of proportional resident memory: a page that several of them
            share counts once.
    """

    seconds: float
    peak_bytes: int


def run_watched(command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]) -> Usage:
    """Run a command and sample its tree.

    Args:
        command: program and arguments.
        log: what it prints is added to this file.
        cwd: where it runs.
        environment: added to this process's own.

    Raises:
        SystemExit: it ended with another code than 0; the end of its log is the message.
    """
    with log.open("a") as out:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
        sampler = TreeSampler(process.pid)
        sampler.start()
        code = process.wait()
        seconds = time.perf_counter() - begin
        sampler.stop()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
    return Usage(seconds, sampler.peak_bytes)


class TreeSampler:
    """Samples the memory of a process and its descendants in a thread of its own, as often as hardly costs time.

    Attributes:
        peak_bytes: the largest sum seen so far.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """End it; the peak is final afterwards."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            begin = time.perf_counter()
            self.peak_bytes = max(self.peak_bytes, tree_bytes(self._pid))
            if self._ended.wait(max(SAMPLE_SECONDS, PAUSES * (time.perf_counter() - begin))):
                return


def tree_bytes(pid: int) -> int:
    """Return the proportional resident memory of a process and its descendants; one that has ended counts nothing."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(map(proportional_bytes, processes))


def proportional_bytes(process: psutil.Process) -> int:
    """Return a process's own memory and its part of what it shares; 0 when it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # of one that has just ended nothing can be read
        return 0
