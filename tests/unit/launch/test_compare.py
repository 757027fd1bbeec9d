"""`afina compare`: which runs it makes, how it finds learning rates, what it writes. Runs are made up here; real ones
are in tests/end_to_end/test_compare_verb.py."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import launch.together
import launch.trials
from launch.compare.candidates import Candidate
from launch.compare.compare import best_rate, next_rate, plan_comparison, run_comparison
from launch.trials import Trial
from tests.helpers.trials import GroupStandIn
from trainer.config import load, run_folder, to_yaml
from trainer.errors import ConfigError

TINY = ["debug=tiny", "run.dir=there", "run.name=c"]


class Runs:
    """Stands in for training: writes what a run writes. The loss is lowest at a rate of 1e-3 times what ``best`` says,
    and infinite above ``diverges``."""

    def __init__(self) -> None:
        self.groups = GroupStandIn(lambda trial: self.run_if_needed(trial, "in a group"))
        self.started: list[Path] = []
        self.trials: list[Trial] = []
        self.best = 1.0
        self.diverges = math.inf
        self.stop_at: str | None = None

    def run_if_needed(self, trial: Trial, label: str, *_: Any) -> tuple[int, str]:
        assert label
        folder = trial.folder
        rate = trial.config.optim.learning_rate
        assert rate is not None
        if (folder / "summary.json").exists():
            return 0, ""
        if self.stop_at is not None and folder.name == self.stop_at:
            return 75, "stopped"
        self.started.append(folder)
        self.trials.append(trial)
        if rate > self.diverges:
            return 5, "the loss is not finite"
        loss = abs(math.log10(rate / (1e-3 * self.best))) + 1
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 1000)
        (folder / "config.yaml").write_text(to_yaml(trial.config))
        step = {"useful_tokens": 30, "step_seconds": 0.5, "peak_memory_bytes": 2**30}
        lines = [{"step": 0, "eval_loss": 5.0}, {"step": 1, **step}, {"step": 2, **step, "peak_memory_bytes": 2**31}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        before = {"eval_loss_before": 5.0, "exact_match_before": 0.0} if trial.config.eval.before else {}
        summary = {"status": "finished", "wall_seconds": 9.0, "trainable_parameters": 50, "total_parameters": 1000}
        metrics = {"eval_loss": loss, "exact_match": 0.5, **before}
        (folder / "summary.json").write_text(json.dumps({**summary, "train_loss": 1.0, "metrics": metrics}))
        return 0, ""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.trials, "run_if_needed", made.run_if_needed)
    monkeypatch.setattr(launch.together, "run_group", made.groups)
    return made


def methods(*names: str) -> str:
    return "compare.methods=[" + ",".join(f"'{name}'" for name in names) + "]"


def configs(*overrides: str) -> list[Any]:
    return [candidate.config for candidate in plan_comparison([*TINY, *overrides])[1]]


def test_the_default_list_is_every_method() -> None:
    folder, candidates = plan_comparison(["debug=tiny", "run.dir=there"])
    assert folder.parent == Path("there")
    assert [candidate.refused for candidate in candidates] == [None] * 13
    kinds = [(e.config.method.name, e.config.method.r, e.config.method.bits, e.config.method.dora) for e in candidates]
    assert kinds[:8] == [
        ("full", None, 16, False),
        *(("lora", r, 16, False) for r in (8, 16, 32, 64)),
        ("lora", 16, 4, False),
        ("lora", 16, 8, False),
        ("lora", 16, 16, True),
    ]
    assert [kind[0] for kind in kinds[8:]] == ["adalora", "prefix", "prompt", "ia3", "bottleneck"]
    assert len({str(candidate.config.data) for candidate in candidates}) == 1


def test_each_has_its_own_learning_rate_unless_one_is_typed() -> None:
    chosen = methods("full", "lora r=8", "lora r=4 optim.learning_rate=0.5", "ia3")
    # an experiment's rate suits the experiment's method
    assert [e.rate for e in plan_comparison(["experiment=demo", chosen])[1]] == [2e-5, 2e-4, 0.5, 3e-3]
    assert [e.rate for e in plan_comparison(["experiment=demo", chosen, "optim.learning_rate=0.1"])[1]] == [
        0.1,
        0.1,
        0.5,
        0.1,
    ]


def test_a_key_of_method_is_for_the_methods_that_have_it() -> None:
    found = configs(methods("full", "lora r=8", "prompt", "prefix"), "method.virtual_tokens=7", "method.alpha=3")
    assert [config.method.virtual_tokens for config in found] == [None, None, 7, 7]
    assert [config.method.alpha for config in found] == [None, 3, None, None]


def test_the_untrained_model_is_scored_once() -> None:
    folder, candidates = plan_comparison([*TINY, methods("full", "lora r=8", "ia3")])
    assert ["eval.before=false" in candidate.overrides for candidate in candidates] == [False, True, True]
    assert folder == Path("there/c")


def test_what_cannot_be_trained_is_a_line_with_the_reason(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = methods("prefix", "lora r=8", "dora bits=8")
    assert run_comparison([*TINY, chosen, "model.gradient_checkpointing=true"]) == 0
    assert [folder.name for folder in runs.started] == ["lora-r8"]
    out = capsys.readouterr().out
    assert "prefix: model.gradient_checkpointing=true" in out
    assert "dora bits=8: method.dora=true" in out


@pytest.mark.parametrize(
    ("typed", "part"),
    [
        ("method=lora", "compare.methods=[lora]"),
        ("rank=large", "compare.methods"),
        ("compare.methods=[]", "must name a method"),
        ("compare.methods=[lorra]", "compare.methods=[lora]"),
        (methods("lora rank=8"), "rank=8 is not a key"),
        (methods("lora r"), '["lora r=8"]'),
        (methods("lora batch.global_size=8"), "optim.learning_rate"),
        (methods("lora r=8", "lora r=8"), "twice"),
        ("compare.tune=[1,-3]", "greater than 0"),
        ("compare.rows=0", "at least 1"),
        (methods("dora bits=8"), "none can be trained here"),
    ],
)
def test_what_is_refused(typed: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_comparison([*TINY, typed])
    assert part in str(caught.value)


def test_rates_cannot_be_tried_without_held_out_rows() -> None:
    with pytest.raises(ConfigError, match="judges the tries by held-out rows"):
        plan_comparison(["model=tiny", "data.validation=0", "compare.tune=[1]"])


def test_what_is_written(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_comparison([*TINY, methods("full", "lora r=8"), "eval.metrics=[loss,exact_match]", "compare.rows=20"]) == 0
    )
    with Path("there/c/compare.csv").open() as file:
        base, full, lora = csv.DictReader(file)
    assert (base["method"], base["eval_loss"], base["exact_match"], base["seconds"]) == (
        "no training",
        "5.0",
        "0.0",
        "",
    )
    assert (full["method"], full["trainable_parameters"], full["trainable_percent"]) == ("full", "50", "5.0")
    assert (lora["useful_tokens_per_second"], lora["peak_memory_bytes"]) == ("60.0", str(2**31))
    assert (lora["adapter_bytes"], lora["seconds"], lora["learning_rate"]) == ("1000", "9.0", "0.0002")
    assert float(lora["eval_loss"]) == pytest.approx(1 + math.log10(5))
    assert load([], Path("there/c/lora-r8/config.yaml")).data.max_rows == 20
    lines = Path("there/c/compare.md").read_text().splitlines()
    assert len(lines) == 5
    assert [run_folder(load(trial.overrides)) for trial in runs.trials] == [
        Path("there/c/full"),
        Path("there/c/lora-r8"),
    ]
    assert "| lora r=8 | 0.0002 | 50 | 5.00 % |" in lines[4]
    assert Path("there/c/compare.png").read_bytes().startswith(b"\x89PNG")
    assert "lora r=8" in capsys.readouterr().out


def test_rates_are_tried_on_fewer_rows_until_the_best_is_no_longer_at_the_edge(runs: Runs) -> None:
    assert run_comparison([*TINY, methods("lora r=8"), "compare.tune=[0.5,1]", "compare.tune_rows=10"]) == 0
    names = [folder.name for folder in runs.started]
    assert names == [f"lora-r8-{rate}" for rate in ("0.0001", "0.0002", "0.0004", "0.0008", "0.0016")] + ["lora-r8"]
    assert load([], runs.started[0] / "config.yaml").data.max_rows == 10
    assert load([], runs.started[0] / "config.yaml").eval.metrics == ["loss"]
    assert load([], runs.started[-1] / "config.yaml").optim.learning_rate == 0.0008
    assert "0.0004 → 1.3979" in Path("there/c/compare.md").read_text()


def test_the_grid_is_tried_by_one_process_where_it_can_be(runs: Runs) -> None:
    tuned = [*TINY, "compare.tune=[0.5,1]", "compare.tune_rows=10"]
    assert run_comparison([*tuned, methods("lora r=8", "dora r=8", "ia3")]) == 0
    assert runs.groups.groups == [["lora-r8-0.0001", "lora-r8-0.0002"]], "beyond the edge one by one"
    assert load([], Path("there/c/dora-r8/config.yaml")).optim.learning_rate == 0.0008
    assert run_comparison([*tuned, methods("lora r=8"), "sweep.fuse=off", "run.name=d"]) == 0
    assert len(runs.groups.groups) == 1


def test_all_runs_of_a_comparison_are_one_group_unless_one_is_typed(runs: Runs) -> None:
    assert run_comparison([*TINY, methods("lora r=8", "ia3"), "compare.tune=[1]"]) == 0
    assert len(runs.trials) > 3
    assert {trial.config.log.group for trial in runs.trials} == {"c"}
    runs.trials.clear()
    assert run_comparison([*TINY, methods("lora r=8"), "compare.tune=[1]", "run.name=d", "log.group=theirs"]) == 0
    assert len(runs.trials) > 1
    assert {trial.config.log.group for trial in runs.trials} == {"theirs"}


def test_a_rate_at_which_training_diverges_is_not_taken(runs: Runs) -> None:
    runs.diverges = 3e-4
    assert run_comparison([*TINY, methods("lora r=8"), "compare.tune=[1,2]"]) == 0
    assert load([], Path("there/c/lora-r8/config.yaml")).optim.learning_rate == 2e-4


def test_a_method_of_which_every_try_fails_is_told_and_the_others_go_on(runs: Runs) -> None:
    runs.diverges = 1e-6
    assert run_comparison([*TINY, methods("lora r=8", "full optim.learning_rate=1e-7"), "compare.tune=[1,2]"]) == 1
    assert [folder.name for folder in runs.started] == [
        "lora-r8-0.0002",
        "lora-r8-0.0004",
        "full-optim.learning_rate1e-7",
    ]
    assert "- lora r=8: the loss is not finite" in Path("there/c/compare.md").read_text()


def test_stopped_and_started_again_it_does_what_is_left(runs: Runs) -> None:
    typed = [*TINY, methods("full", "lora r=8", "ia3"), "compare.tune=[1]"]
    runs.best, runs.stop_at = 0.2, "lora-r8"
    assert run_comparison(typed) == 75
    assert "| ia3 | - |" in Path("there/c/compare.md").read_text()
    before, runs.started, runs.stop_at = runs.started, [], None
    assert run_comparison(typed) == 0
    assert not set(before) & set(runs.started)
    assert next(folder.name for folder in runs.started) == "lora-r8"
    assert "not run" not in Path("there/c/compare.md").read_text()


@given(
    optimum=st.floats(-6, -1),
    start=st.floats(-5, -2),
    ratio=st.floats(1.5, 10),
)
def test_the_search_ends_beside_the_optimum(optimum: float, start: float, ratio: float) -> None:
    """Of a loss with one minimum in the logarithm of the rate."""
    tried: dict[float, float] = {}
    rates = [10**start, 10**start * ratio]
    for _ in range(60):
        tried |= {rate: abs(math.log10(rate) - optimum) for rate in rates}
        beyond = next_rate(tried, ratio)
        if beyond is None:
            break
        assert beyond not in tried
        rates = [beyond]
    # two digits a rate are within 5 % of it
    assert abs(math.log10(best_rate(tried)) - optimum) <= math.log10(ratio) / 2 + 0.05


def test_equal_losses_take_the_lower_rate() -> None:
    assert best_rate({3e-4: 1.0, 1e-4: 1.0, 1e-3: 2.0}) == 1e-4


def test_an_entrant_says_nothing_that_it_does_not_have() -> None:
    from launch.compare.report import collect

    records = collect([Candidate("lora", []), Candidate("full", [], refused="why")])
    assert [record["status"] for record in records] == ["not run", "refused"]
    assert {key for record in records for key, value in record.items() if value not in (None, {})} == {
        "method",
        "status",
        "error",
    }
