"""Early stopping of a sweep: rungs, who goes on, and that an interrupted sweep decides alike. Runs are stood in for."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest

import launch.together
from launch.sweep.sweep import run_sweep
from launch.trials import Trial
from tests.helpers.trials import GroupStandIn, stand_in
from trainer.config import to_yaml
from trainer.tracking.files import MetricsFile
from trainer.tracking.halving import best, decide, score_until

ASHA = ["debug=tiny", "run.name=s", "batch.max_steps=20", "sweep.early_stopping=asha"]
ASHA += ["sweep.min_steps=2", "sweep.reduction_factor=2"]
NINE = ",".join(map(str, range(2, 11)))


class Trainer:
    """Stands in for runs: a line a step, evaluations at even steps, stopped at ``run.stop_at_step``; a kill may leave
    a run anywhere."""

    def __init__(self) -> None:
        self.groups: GroupStandIn
        self.fails: tuple[int, int | None] | None = None  # which rank, on the way to which step
        self.begun: list[tuple[str, int | None]] = []
        self.left = math.inf
        self.steps: dict[str, int] = {}

    def run_trial(self, trial: Trial, *_: object) -> tuple[int, str]:
        if not self.left:
            return 143, ""
        self.left -= 1
        stop, total, r = trial.config.run.stop_at_step, trial.config.batch.max_steps, trial.config.method.r
        assert total is not None
        assert r is not None
        self.begun.append((trial.name, stop))
        if r == 7 or (r, stop) == self.fails:
            return 5, "loss is not finite"
        trial.folder.mkdir(parents=True, exist_ok=True)
        (trial.folder / "config.yaml").write_text(to_yaml(trial.config))
        file = MetricsFile(trial.folder, resume_step=self.steps.get(trial.name, 0))
        end = min(stop or total, total)
        for step in range(self.steps.get(trial.name, 0) + 1, end + 1):
            record: dict[str, float] = {"step": step, "loss": 5 - step * r / 100}
            file.write(record | ({"eval_loss": loss(r, step)} if step % 2 == 0 else {}))
        file.close()
        self.steps[trial.name] = max(end, self.steps.get(trial.name, 0))
        summary = {"status": "finished" if end == total else "preempted", "steps": self.steps[trial.name]}
        (trial.folder / "summary.json").write_text(json.dumps({**summary, "metrics": {"eval_loss": loss(r, end)}}))
        return 0, ""


def loss(r: int, step: int) -> float:
    """The order of trials changes with the steps."""
    return random.Random(f"{r}/{step}").random() - step / 10


@pytest.fixture(params=["off", "auto"])
def asha(request: pytest.FixtureRequest) -> list[str]:
    """Trials by themselves, and all in one process that goes from rung to rung by itself."""
    return [*ASHA, f"sweep.fuse={request.param}"]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    made.groups = stand_in(monkeypatch, tmp_path, made.run_trial)
    return made


def table() -> dict[str, str]:
    with Path("runs/s/sweep.csv").open() as file:
        return {row["method.r"]: row["status"] for row in csv.DictReader(file)}


def expected(ranks: list[int]) -> dict[str, str]:
    """Successive halving in a few lines: trial 7 fails, and half of the rest goes on at 2, 4, 8, 16 steps."""
    status, rung, step = {"7": "failed"}, 0, 2
    alive = [r for r in ranks if r != 7]
    while len(alive) > 1:
        kept = sorted(alive, key=lambda r: loss(r, step))[: len(alive) // 2]
        status |= {str(r): f"stopped at rung {rung}, step {step}" for r in alive if r not in kept}
        alive, rung, step = kept, rung + 1, step * 2
    return {**status, str(alive[0]): "finished"}


def test_half_of_a_rung_goes_on(runs: Trainer, asha: list[str]) -> None:
    assert run_sweep([*asha, f"method.r={NINE}"]) == 1
    assert table() == expected(list(range(2, 11)))
    assert [step for _, step in runs.begun] == [2] * 9 + [4] * 4 + [8] * 2 + [None]


def test_a_sweep_that_is_stopped_anywhere_has_the_same_survivors(
    runs: Trainer, asha: list[str], logged: list[str]
) -> None:
    for left in (3, 4, 5, 2, math.inf):
        runs.left = left
        assert run_sweep([*asha, f"method.r={NINE}"]) == (1 if left == math.inf else 143)
    assert table() == expected(list(range(2, 11)))
    again = [name for name, _ in runs.begun if name != "r7"]
    assert len(again) == 8 + 4 + 2 + 1, "nothing is trained twice"
    assert {line.split(":")[0] for line in logged if ": failed" in line} == {"[6/9] r7"}


def test_trials_that_have_gone_on_are_judged_by_their_rung(runs: Trainer, asha: list[str]) -> None:
    """The folder of one that was promoted holds later, better scores."""
    assert run_sweep([*asha, "method.r=2,3,4,5"]) == 0
    first = table()
    begun = runs.begun.copy()
    assert run_sweep([*asha, "method.r=2,3,4,5"]) == 0
    assert table() == first
    assert runs.begun == begun


def test_rungs_beyond_the_end_are_no_rungs(runs: Trainer, asha: list[str]) -> None:
    assert run_sweep([*asha, "method.r=2,3,4,5", "sweep.min_steps=30"]) == 0
    assert set(table().values()) == {"finished"}
    assert [step for _, step in runs.begun] == [30] * 4


def test_groups_go_from_rung_to_rung_where_there_are_several(runs: Trainer) -> None:
    assert run_sweep([*ASHA, f"method.r={NINE}", "sweep.fuse=3"]) == 1
    assert table() == expected(list(range(2, 11)))
    assert [step for _, step in runs.begun] == [2] * 9 + [4] * 4 + [8] * 2 + [None]
    assert [len(names) for names in runs.groups.groups] == [3, 3, 3, 2, 2, 2]
    *earlier, last = runs.groups.rules
    assert earlier == [None] * 5
    assert last is not None
    assert last["min_steps"] == 8, "two are left, and one process has both"


def test_one_group_is_told_the_rules(runs: Trainer) -> None:
    assert run_sweep([*ASHA, "method.r=2,3,4,5"]) == 0
    rules = {"min_steps": 2, "reduction_factor": 2, "metric": "eval_loss", "lower_is_better": True}
    assert runs.groups.rules == [rules]
    assert runs.groups.groups == [["r2", "r3", "r4", "r5"]]


def test_one_that_fails_on_its_way_was_judged_before_as_well(runs: Trainer) -> None:
    """The trials that go on are the same whether the rungs are decided here or by the process of the group."""
    kept = sorted(range(2, 7), key=lambda r: loss(r, 2))[:2]
    tables = []
    for fuse in ("off", "auto"):
        runs.fails = (kept[0], 4)
        assert run_sweep([*ASHA, "method.r=2,3,4,5,6", f"sweep.fuse={fuse}", f"run.dir={fuse}"]) == 1
        with Path(fuse, "s", "sweep.csv").open() as file:
            tables.append({row["method.r"]: row["status"] for row in csv.DictReader(file)})
        runs.steps = {}
    assert tables[0] == tables[1]
    assert tables[0][str(kept[0])] == "failed"
    assert tables[0][str(kept[1])] == "finished"


def test_the_death_of_the_process_is_none_of_the_trials_that_it_had_left_behind(
    runs: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lives: one trial fails before the first rung, and behind it the sweep is stopped; in the second all are in a
    process again, because that one is tried again, and it dies."""
    typed = [*ASHA, "method.r=2,3,4,5,6"]
    failed, *others = sorted(range(2, 7), key=lambda r: -loss(r, 2))
    kept = others[-2:]
    runs.left, runs.fails = 5, (failed, 2)
    assert run_sweep(typed) == 143
    monkeypatch.setattr(launch.together, "run_group", lambda *_: (1, "exit code 1"))
    assert run_sweep(typed) == 1
    behind = {str(r): "stopped at rung 0, step 2" for r in others if r not in kept}
    assert table() == {**behind, **{str(r): "failed" for r in (*kept, failed)}}


def test_without_scores_the_training_loss_decides(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, resume_step=0)
    for step in range(1, 31):
        file.write({"step": step, "loss": float(step), **({"eval_loss": 0.5} if step == 30 else {})})
    file.close()
    assert score_until(tmp_path, 29, "eval_loss") == sum(range(20, 30)) / 10
    assert score_until(tmp_path, 30, "eval_loss") == 0.5
    assert score_until(tmp_path, 5, "train_loss") == 3.0
    assert score_until(tmp_path / "none", 5, "eval_loss") is None


def test_the_best() -> None:
    assert best([3.0, 1.0, None, 2.0], 2, lower_is_better=True) == [1, 3]
    assert best([3.0, 1.0, None, 2.0], 2, lower_is_better=False) == [0, 3]
    assert best([1.0, 1.0, math.nan], 1, lower_is_better=True) == [0]


def test_one_in_so_many_goes_on_and_always_one() -> None:
    assert decide([5.0, 4.0, 3.0, 2.0, 1.0], 2, lower_is_better=True) == [3, 4]
    assert decide([5.0, 4.0], 3, lower_is_better=False) == [0]
