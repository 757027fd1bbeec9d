"""A case that raises, dies or hangs fails alone: those before it and behind it have their values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cases import run_cases

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from tests.helpers.cases import record_cases

dist.init_process_group("gloo")
rank = dist.get_rank()

def fails_on_rank_1():
    if rank == 1:
        raise RuntimeError("the reason")
    time.sleep(60)

def hangs():
    time.sleep(60)

cases = {"first": lambda: rank + 1, "raises": fails_on_rank_1, "second": lambda: [2.5], "dies": lambda: os._exit(9)}
cases |= {"third": lambda: None, "hangs": hangs, "last": lambda: 1}
record_cases(cases, Path(sys.argv[1]), is_main=rank == 0, barrier=dist.barrier, hung_seconds=3)
"""


def test_a_case_that_crashes_loses_no_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = run_cases(script, tmp_path)
    assert list(found) == ["first", "raises", "second", "dies", "third", "hangs", "last"]
    assert (found["first"], found["second"], found["third"]) == (1, [2.5], None)
    for name, reason in {"raises": "RuntimeError: the reason", "dies": "exited", "hangs": "Timeout (0:00:03)!"}.items():
        with pytest.raises(pytest.fail.Exception, match=f"'{name}' crashed") as failure:
            found[name]
        assert reason in str(failure.value)
    assert "in hangs" in found.crashes["hangs"], "its stack says where it stood"
    assert "the reason" not in found.crashes["dies"]
    with pytest.raises(pytest.fail.Exception, match="'last' was not reached: 'raises', 'dies', 'hangs' crashed"):
        found["last"]
    with pytest.raises(KeyError):
        found["no such case"]


def test_a_crash_outside_the_cases_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise ImportError('the reason')")
    with pytest.raises(AssertionError, match=r"(?s)script\.py crashed outside its cases.*the reason"):
        run_cases(script, tmp_path, nproc=1)
