"""The plan of a run: what is due after each update, against a plain count of rows and updates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.config.schema import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from trainer.training.schedule import Schedule


@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 40),
    total=st.integers(1, 30),
    evaluate=st.integers(0, 7),
    save=st.integers(0, 7),
    at_epochs=st.tuples(st.booleans(), st.booleans()),
    has_validation=st.booleans(),
)
def test_what_is_due(
    rows: int, size: int, total: int, evaluate: int, save: int, at_epochs: tuple[bool, bool], has_validation: bool
) -> None:
    config = TrainConfig(
        batch=BatchConfig(global_size=min(size, rows)),
        eval=EvalConfig(every_steps=evaluate, every_epoch=at_epochs[0]),
        checkpoint=CheckpointConfig(every_steps=save, every_epoch=at_epochs[1]),
    )
    schedule = Schedule(config, total, rows, has_validation)
    seen = 0
    for done in range(1, total + 1):
        passes_before, seen = seen // rows, seen + config.batch.global_size
        ends_pass = seen // rows > passes_before
        due = schedule.due(done)
        assert due.is_last == (done == total)
        evaluates = due.is_last or (evaluate and done % evaluate == 0) or (at_epochs[0] and ends_pass)
        assert due.evaluation == bool(evaluates and has_validation)
        assert due.checkpoint == bool((save and done % save == 0) or (at_epochs[1] and ends_pass))
        assert schedule.epoch(done) == seen / rows


def test_the_learning_rate_is_of_the_step_alone() -> None:
    """Linear warmup over 2 of 10 updates, then a line to 0."""
    config = TrainConfig(
        optim=OptimConfig(learning_rate=0.8), schedule=ScheduleConfig(name="linear", warmup_steps=2, warmup_ratio=0.0)
    )
    schedule = Schedule(config, 10, 100, True)
    expected = [0.4, 0.8, *(0.8 * (1 - k / 8) for k in range(8))]
    for order in (range(10), reversed(range(10))):
        for step in order:
            assert abs(schedule.learning_rate(step) - expected[step]) < 1e-12


def test_a_run_that_stops_for_now_is_saved_there_and_keeps_its_schedule() -> None:
    whole = Schedule(TrainConfig(checkpoint=CheckpointConfig(every_steps=0)), 10, 100, True)
    config = TrainConfig(checkpoint=CheckpointConfig(every_steps=0), run=RunConfig(stop_at_step=4))
    schedule = Schedule(config, 10, 100, True)
    assert [done for done in range(1, 11) if schedule.due(done).stop] == [4, 5, 6, 7, 8, 9], "the end is no stop"
    assert schedule.due(4).checkpoint
    assert not schedule.due(3).checkpoint
    for step in range(10):
        assert schedule.learning_rate(step) == whole.learning_rate(step)
        assert schedule.due(step + 1).evaluation == whole.due(step + 1).evaluation
