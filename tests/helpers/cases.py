"""Run many cases in one group of ranks, each recorded as it ends, so that one that crashes or hangs loses no other.

The script calls ``record_cases``, the test ``run_cases``. Between them stands a folder: ``skip.json`` names the cases
that the script leaves out, and rank 0 appends a line to ``cases.jsonl`` at the start and at the end of each case.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT, Finished, torchrun
from tests.helpers.warm import ranks

# Output behind it is that of the case.
MARKER = "== case "
# The tracebacks of all ranks.
SHOWN_LINES = 150
HUNG_SECONDS = 240
STACKS = "hung-rank-{}.txt"
MAX_STARTS = 3


def record_cases(
    cases: Mapping[str, Callable[[], Any]],
    folder: Path,
    *,
    is_main: bool,
    barrier: Callable[[], Any],
    hung_seconds: float = HUNG_SECONDS,
) -> None:
    """Run the cases in their order on this rank, and write what they return on rank 0 as JSON, one line a case.

    A case that takes more than ``hung_seconds`` ends the process, with the stack of every thread in its rank's own
    file: on the stderr that they share, the ranks' stacks would run into one another.
    """
    skipped = json.loads((folder / "skip.json").read_text())
    stacks = (folder / STACKS.format(os.environ["RANK"])).open("w")

    def write(**line: Any) -> None:
        with (folder / "cases.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    if is_main:
        write(names=list(cases))
    for name in [name for name in cases if name not in skipped]:
        if is_main:
            print(f"{MARKER}{name}", flush=True)
            write(begun=name)
        faulthandler.dump_traceback_later(hung_seconds, exit=True, file=stacks)
        barrier()  # or a fast rank could fail before the marker is out
        value = cases[name]()
        faulthandler.cancel_dump_traceback_later()
        if is_main:
            print(value, flush=True)
            write(ended=name, value=value)


class Cases(Mapping[str, Any]):
    """The value of each case. Asking for one that has none fails the test, with why."""

    def __init__(self, folder: Path) -> None:
        file = folder / "cases.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.names: list[str] = next((line["names"] for line in lines if "names" in line), [])
        self.ended = {line["ended"]: line["value"] for line in lines if "ended" in line}
        self.begun = [line["begun"] for line in lines if "begun" in line]
        self.crashes: dict[str, str] = {}

    def __getitem__(self, name: str) -> Any:
        __tracebackhide__ = True
        if name in self.ended:
            return self.ended[name]
        if name in self.crashes:
            pytest.fail(f"{name!r} crashed\n{self.crashes[name]}", pytrace=False)
        if name in self.names:
            pytest.fail(f"{name!r} was not reached: {', '.join(map(repr, self.crashes))} crashed", pytrace=False)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def run_cases(
    script: Path,
    folder: Path,
    *args: str | os.PathLike[str],
    nproc: int = 2,
    env: Mapping[str, str] | None = None,
    cold: bool = False,
    timeout_seconds: float = 600,
) -> Cases:
    """Run a script of cases in ``nproc`` ranks, its first argument ``folder``, and return what its cases gave.

    After a crash it is started again for the cases that are left, ``MAX_STARTS`` times in all. ``cold`` starts them by
    torchrun: for variables that are read once, at the start of a process, as glibc's are.

    Raises:
        AssertionError: it crashed outside its cases.
    """
    __tracebackhide__ = True
    end = time.monotonic() + timeout_seconds
    crashes: dict[str, str] = {}
    (folder / "skip.json").write_text("[]")
    for _ in range(MAX_STARTS):
        start = torchrun if cold else ranks
        crash = _start(start, script, folder, *args, nproc=nproc, env=env, timeout_seconds=end - time.monotonic())
        cases = Cases(folder)
        if crash is None:
            break
        running = [name for name in cases.begun if name not in cases.ended and name not in crashes]
        assert running, f"{script.name} crashed outside its cases\n{crash}"
        crashes[running[0]] = crash
        if time.monotonic() > end:
            break
        (folder / "skip.json").write_text(json.dumps([*cases.ended, *crashes]))
    cases.crashes = crashes
    return cases


def _start(
    start: Callable[..., Finished],
    script: Path,
    folder: Path,
    *args: str | os.PathLike[str],
    nproc: int,
    env: Mapping[str, str] | None,
    timeout_seconds: float,
) -> str | None:
    """Run the script once. If it crashes, return the last lines that it printed since the last case began."""
    variables = {"PYTHONPATH": str(ROOT), **(env or {})}
    for old in folder.glob(STACKS.format("*")):
        old.unlink()
    try:
        done = start(script, folder, *args, nproc=nproc, env=variables, timeout_seconds=timeout_seconds, check=False)
    except AssertionError as timeout:
        return str(timeout)
    if done.returncode == 0:
        return None
    lines = done.output.rpartition(MARKER)[2].splitlines()
    stacks = [f"== {file.stem}\n{file.read_text()}" for file in sorted(folder.glob(STACKS.format("*")))]
    return "\n".join([f"exited {done.returncode}", *lines[-SHOWN_LINES:], *stacks])
