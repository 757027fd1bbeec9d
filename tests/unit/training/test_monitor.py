"""Watching the evaluations: what is best, when to stop, when to warn; and the keys that ask for it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config import load
from trainer.config.schema import LOWER_IS_BETTER, EvalConfig
from trainer.errors import ConfigError
from trainer.training.monitor import Decision, EvalMonitor

METRICS = ("eval_loss", "eval_perplexity", "exact_match", "chrf")


def keys(**given: Any) -> EvalConfig:
    return EvalConfig(**{"overfit_gap": None, "every_steps": 1, **given})


def evaluations(monitor: EvalMonitor, values: list[float], metric: str = "eval_loss") -> list[Decision]:
    return [monitor.evaluated(step, {metric: value}) for step, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval_loss", [3.0, 2.0, 2.5, 2.0, 1.5], [1, 2, 5]),  # an equal one is no new best
        ("eval_perplexity", [20.0, 7.0, 9.0], [1, 2]),
        ("exact_match", [0.0, 0.5, 0.5, 0.25, 0.75], [1, 2, 5]),
        ("eval_loss", [math.nan, 3.0, math.nan, math.inf, 2.0], [2, 5]),
    ],
)
def test_new_bests(metric: str, values: list[float], best: list[int]) -> None:
    monitor = EvalMonitor(keys(best_metric=metric))
    decisions = evaluations(monitor, values, metric)
    assert [step for step, decision in enumerate(decisions, 1) if decision.is_best] == best
    assert monitor.best_step == best[-1]
    assert monitor.best is not None
    assert monitor.best["scores"] == {metric: values[best[-1] - 1]}


def test_the_evaluation_before_training_is_no_best() -> None:
    monitor = EvalMonitor(keys(best_metric="eval_loss", patience=1))
    assert monitor.evaluated(0, {"eval_loss": 0.1}) == Decision()
    assert monitor.evaluated(2, {"eval_loss": 5.0}).is_best


def test_patience_counts_evaluations_in_a_row() -> None:
    monitor = EvalMonitor(keys(best_metric="eval_loss", patience=2))
    stops = [decision.stop for decision in evaluations(monitor, [3.0, 3.5, 2.0, 2.5, 2.1])]
    assert stops == [None] * 4 + ["2 evaluations in a row without a new best eval_loss"]


def test_patience_alone_keeps_the_last_weights() -> None:
    monitor = EvalMonitor(keys(patience=1))
    decisions = evaluations(monitor, [3.0, 2.0, 2.5])
    assert not any(decision.is_best for decision in decisions), "no checkpoint is to be saved"
    assert monitor.best_step is None
    assert [decision.stop for decision in decisions] == [None, None, "1 evaluation without a new best eval_loss"]


def test_what_could_not_be_saved_may_be_beaten() -> None:
    monitor = EvalMonitor(keys(best_metric="eval_loss"))
    evaluations(monitor, [3.0, 1.0])
    monitor.not_saved()
    assert monitor.best_step == 1
    assert monitor.evaluated(3, {"eval_loss": 2.0}).is_best
    assert monitor.best_step == 3


def overfit(monitor: EvalMonitor, *rounds: tuple[list[float], float]) -> list[Decision]:
    decisions = []
    for step, (losses, eval_loss) in enumerate(rounds, 1):
        for loss in losses:
            monitor.trained(loss)
        decisions.append(monitor.evaluated(step, {"eval_loss": eval_loss}))
    return decisions


def test_the_warning_comes_once_a_crossing_with_both_numbers() -> None:
    monitor = EvalMonitor(keys(overfit_gap=0.5))
    rounds = ([9.0, 3.0], 3.0), ([2.0, 1.0], 2.25), ([1.0], 2.0), ([1.0], 1.5), ([1.0, 0.5], 1.5)
    first, second, third, fourth, fifth = (decision.warning for decision in overfit(monitor, *rounds))
    assert first is third is fourth is None, "a gap of 0.5 is not more than 0.5"
    assert second is not None
    assert "step 2" in second
    assert "eval_loss 2.2500 is 0.7500 above the mean training loss 1.5000" in second
    assert "eval.best_metric=eval_loss" in second
    assert fifth is not None
    assert "0.7500 above" in fifth
    chosen = overfit(EvalMonitor(keys(overfit_gap=0.5, best_metric="eval_loss")), ([1.0], 2.0))[0].warning
    assert chosen is not None
    assert "eval.best_metric" not in chosen, "it is set already"


def test_the_run_stops_where_the_gap_is_too_wide() -> None:
    rounds = [([1.0], 1.25), ([1.0], 1.75)]
    decisions = overfit(EvalMonitor(keys(overfit_gap=0.5, stop_on_overfit=True, patience=1)), *rounds)
    expected = "overfitting: eval_loss 1.7500 is 0.7500 above the mean training loss 1.0000"
    assert [decision.stop for decision in decisions] == [None, expected]
    # asked for in a run that is over the gap already: the next evaluation stops it, without a second warning
    warned = EvalMonitor(keys(overfit_gap=0.5))
    overfit(warned, *rounds)
    (later,) = overfit(EvalMonitor(keys(overfit_gap=0.5, stop_on_overfit=True), warned.state()), ([1.0], 1.75))
    assert (later.stop, later.warning) == (expected, None)


def test_without_a_loss_there_is_no_gap() -> None:
    monitor = EvalMonitor(EvalConfig())
    monitor.trained(1.0)
    assert monitor.evaluated(1, {"exact_match": 0.5}) == Decision()


def test_a_metric_that_no_row_has_is_told() -> None:
    with pytest.raises(ConfigError, match=r"eval\.best_metric=exact_match: no held-out row"):
        EvalMonitor(keys(best_metric="exact_match")).evaluated(0, {"eval_loss": 1.0})


ROUNDS = st.lists(
    st.tuples(
        st.lists(st.floats(0, 5), min_size=1, max_size=3),
        st.fixed_dictionaries({name: st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 5)) for name in METRICS}),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)
ASKED = st.builds(
    keys,
    best_metric=st.sampled_from([None, *METRICS]),
    patience=st.one_of(st.none(), st.integers(1, 4)),
    overfit_gap=st.one_of(st.none(), st.floats(0.1, 2)),
    stop_on_overfit=st.booleans(),
)


def play(asked: EvalConfig, rounds: list[Any], cut: int | None) -> tuple[list[Decision], Any]:
    """All verdicts and the last state; saved and restored, as JSON, after so many events."""
    monitor, events, decisions = EvalMonitor(asked), 0, []

    def restored(monitor: EvalMonitor) -> EvalMonitor:
        nonlocal events
        events += 1
        return EvalMonitor(asked, json.loads(json.dumps(monitor.state()))) if events == cut else monitor

    for step, (losses, scores, saved) in enumerate(rounds, 1):
        for loss in losses:
            monitor.trained(loss)
            monitor = restored(monitor)
        decisions.append(monitor.evaluated(step, scores))
        if decisions[-1].is_best and not saved:
            monitor.not_saved()
        monitor = restored(monitor)
    return decisions, monitor.state()


@settings(max_examples=150, deadline=None)
@given(ASKED, ROUNDS, st.data())
def test_saved_and_restored_anywhere_is_undisturbed(asked: EvalConfig, rounds: list[Any], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, sum(len(losses) + 1 for losses, _, _ in rounds)))
    assert play(asked, rounds, cut) == play(asked, rounds, None)


@settings(max_examples=150, deadline=None)
@given(ASKED, ROUNDS)
def test_verdicts_are_those_of_the_whole_history(asked: EvalConfig, rounds: list[Any]) -> None:
    """Against the plain definitions, read off all evaluations at once."""
    decisions, _ = play(asked, [(losses, scores, True) for losses, scores, _ in rounds], None)
    metric = asked.best_metric or "eval_loss"
    sign = 1 if metric in LOWER_IS_BETTER else -1
    values = [sign * scores[metric] for _, scores, _ in rounds]
    gaps = [scores["eval_loss"] - sum(losses) / len(losses) for losses, scores, _ in rounds]
    for k, decision in enumerate(decisions):
        since = k - values.index(min(values[: k + 1]))
        wide = asked.overfit_gap is not None and gaps[k] > asked.overfit_gap
        was_wide = asked.overfit_gap is not None and k > 0 and gaps[k - 1] > asked.overfit_gap
        assert decision.is_best == (since == 0 and asked.best_metric is not None)
        assert (decision.warning is not None) == (wide and not was_wide)
        in_vain = asked.patience is not None and since >= asked.patience
        assert (decision.stop is not None) == (in_vain or (wide and asked.stop_on_overfit))


def test_the_state_of_another_question_starts_fresh() -> None:
    monitor = EvalMonitor(keys(best_metric="eval_loss"))
    monitor.trained(2.0)
    monitor.evaluated(1, {"eval_loss": 1.0, "chrf": 0.5})
    monitor.trained(3.0)
    state = monitor.state()
    assert EvalMonitor(keys(best_metric="eval_loss", patience=3), state).best_step == 1
    for other in (keys(best_metric="chrf"), keys(best_metric="eval_loss", max_rows=4), keys()):
        again = EvalMonitor(other, state)
        assert again.best is None
        assert (again.losses, again.steps) == (3.0, 1)


HELD_OUT = ["debug=tiny", "eval.every_steps=2"]


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [
        (["eval.best_metric=eval_loss", "eval.patience=3", "eval.stop_on_overfit=true"], "eval_loss"),
        (["eval.best_metric=exact_match", "eval.overfit_gap=null"], "exact_match"),
        (["eval.patience=1", "eval.every_steps=0", "eval.every_epoch=true"], "eval_loss"),
        (["eval.best_metric=chrf", "eval.metrics=[chrf]"], "chrf"),
        (["eval.metrics=[exact_match]"], None),  # the default gap asks nothing of a run without a loss
        (["data.validation=0", "eval.metrics=[loss]", "eval.every_steps=0"], None),
    ],
)
def test_keys_that_go_together(overrides: list[str], watched: str | None) -> None:
    assert EvalMonitor(load([*HELD_OUT, *overrides]).eval).metric == watched


@pytest.mark.parametrize(
    ("overrides", "told", "hint"),
    [
        (["eval.best_metric=loss"], "must be among eval_loss", "eval.best_metric=eval_loss"),
        (["eval.best_metric=exact"], "must be among", "eval.best_metric=exact_match"),
        (["eval.best_metric=f1"], "f1 is not scored", "eval.metrics=[loss,exact_match,f1]"),
        (["eval.best_metric=eval_loss", "eval.metrics=[f1]"], "is not scored", "eval.metrics=[f1,loss]"),
        (["eval.patience=2", "eval.metrics=[f1]"], "eval_loss is not scored", "eval.metrics=[f1,loss]"),
        (["eval.stop_on_overfit=true", "eval.metrics=[f1]"], "is not scored", "eval.metrics=[f1,loss]"),
        (["eval.stop_on_overfit=true", "eval.overfit_gap=null"], "eval.overfit_gap is null", "eval.overfit_gap=0.5"),
        (["eval.best_metric=eval_loss", "eval.every_steps=0"], "needs evaluations during", "eval.every_epoch=true"),
        (["eval.patience=2", "eval.every_steps=0"], "needs evaluations during", "eval.patience=null"),
        (["eval.stop_on_overfit=true", "eval.every_steps=0"], "needs evaluations during", "eval.stop_on_overfit=false"),
        (["eval.patience=2", "data.validation=0"], "no held-out rows", "data.validation=0.1"),
        (["eval.patience=0"], "at least 1", "eval.patience=1"),
        (["eval.overfit_gap=-1"], "greater than 0", "eval.overfit_gap=0.5"),
    ],
)
def test_keys_that_could_do_nothing_are_refused(overrides: list[str], told: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([*HELD_OUT, *overrides])
    message = str(caught.value)
    assert told in message
    assert hint in message.partition("→")[2]
