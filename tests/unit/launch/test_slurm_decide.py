"""Whether a job goes back into the queue: what ended it, and whether it comes forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm.decide import Life, decide
from launch.slurm.job import WISHED
from launch.slurm.queue import JobState

RUNNING = JobState("RUNNING", "None")
PREEMPTED = Life(138, "preempted", None, "SIGUSR1", first_step=0, saved_step=5, restarts=0)
CRASHED = Life(137, None, None, None, first_step=0, saved_step=0, restarts=0)
LOST = replace(CRASHED, code=4, status="failed", error={"kind": "launch", "message": "rank 1 is gone"})


def told(
    life: Life, job: JobState | None = RUNNING, earlier: list[Life] | None = None, most: int = 100
) -> tuple[bool, str]:
    return decide(life, earlier or [], job, most, WISHED)


@pytest.mark.parametrize(
    ("life", "job", "why"),
    [
        (PREEMPTED, RUNNING, "asked to stop by SIGUSR1"),
        (PREEMPTED, JobState("RUNNING", "None", is_preempted=True), "preempted"),
        (replace(PREEMPTED, stopped_by="SIGTERM"), JobState("COMPLETING", "TimeLimit"), "at the time limit"),
        (CRASHED, JobState("COMPLETING", "TimeLimit"), "at the time limit"),
        (CRASHED, RUNNING, "its processes died (exit code 137)"),
        (LOST, RUNNING, "its processes died (rank 1 is gone)"),
    ],
)
def test_it_goes_back(life: Life, job: JobState, why: str) -> None:
    assert told(life, job) == (True, why)


@pytest.mark.parametrize(
    ("life", "job", "why"),
    [
        (replace(PREEMPTED, status="finished", code=0), RUNNING, "finished"),
        (PREEMPTED, JobState("COMPLETING", "None"), "cancelled"),
        (PREEMPTED, None, "Slurm does not answer"),
        (replace(PREEMPTED, stopped_by="STOP"), RUNNING, "stopped by STOP"),
        (replace(PREEMPTED, stopped_by="run.stop_at_step"), RUNNING, "stopped by run.stop_at_step"),
        (replace(CRASHED, code=2), RUNNING, "an error that a restart would meet again"),
        (replace(CRASHED, code=4), RUNNING, "an error that a restart would meet again"),
        (replace(LOST, code=5, error={"kind": "training", "message": "not finite"}), RUNNING, "would meet again"),
        (replace(PREEMPTED, restarts=100), RUNNING, "launch.max_requeues"),
    ],
)
def test_it_does_not(life: Life, job: JobState | None, why: str) -> None:
    again, said = told(life, job)
    assert not again
    assert why in said


def test_zero_requeues_are_none() -> None:
    assert not told(PREEMPTED, most=0)[0]


def test_two_restarts_without_a_new_step_are_the_last() -> None:
    first, second, third = CRASHED, replace(CRASHED, restarts=1), replace(CRASHED, restarts=2)
    assert told(first)[0]
    assert told(second, earlier=[first])[0]
    again, why = told(third, earlier=[first, second])
    assert not again
    assert why == "2 restarts in a row have saved no step after 0"
    forward = replace(second, first_step=0, saved_step=10)
    assert told(replace(third, first_step=10, saved_step=10), earlier=[first, forward])[0]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60), st.integers(0, 12))
def test_no_job_goes_on_for_ever(lives: list[tuple[bool, int]], most: int) -> None:
    """Whatever each life comes to: never more than ``max_requeues`` restarts, never three idle ones in a row."""
    earlier: list[Life] = []
    saved = 0
    for number, (saves, steps) in enumerate(lives):
        now = saved + (steps if saves else 0)
        life = replace(CRASHED, first_step=saved, saved_step=now, restarts=number)
        again, _ = told(life, earlier=earlier, most=most)
        earlier.append(life)
        saved = now
        if not again:
            break
    assert len(earlier) <= most + 1
    idle = "".join("i" if life.is_idle else "f" for life in earlier)
    assert "iii" not in idle
