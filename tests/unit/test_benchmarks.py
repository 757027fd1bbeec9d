"""The measuring of sweeps and methods: what is read out of run folders and of a process tree, and the pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import _sweep_page, _tree, methods, sweep
from launch.compare import report as comparison
from launch.sweep.plan import plan_sweep

MIB = 2**20


def make_trial(folder: Path, seconds: list[float], value: float, status: str = "finished") -> None:
    """Make a run folder as a trial leaves it: lines of steps, a summary, an adapter of two tensors."""
    (folder / "adapter").mkdir(parents=True)
    lines = [{"step": 0, "eval_loss": 4.0}] + [{"step": i, "step_seconds": s} for i, s in enumerate(seconds, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"status": status, "metrics": {"eval_loss": value}}))
    tensors = {"a": torch.ones(4), "b": torch.full((2, 2), value)}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")


def test_a_step_of_a_group_counts_once_and_of_lone_runs_each(tmp_path: Path) -> None:
    make_trial(tmp_path / "r4", [2.0, 1.0, 0.5], 1.0)
    make_trial(tmp_path / "r8", [2.0, 1.5], 1.0, status="preempted")
    (tmp_path / ".together" / "d").mkdir(parents=True)
    (tmp_path / ".together" / "metrics.jsonl").write_text("not a trial's")
    assert sweep.group_step_seconds(tmp_path) == pytest.approx(2.0 + 1.5 + 0.5)
    assert sweep.lone_step_seconds(tmp_path) == pytest.approx(7.0)
    assert [folder.name for folder in sweep.finished(tmp_path)] == ["r4"]


def test_the_distance_is_that_of_the_tensor_that_is_farthest(tmp_path: Path) -> None:
    for side, value in (("fused", 1.01), ("apart", 1.0)):
        make_trial(tmp_path / side / "r4", [1.0], 1.0)
        make_trial(tmp_path / side / "r8", [1.0], value)
    assert sweep.largest_distance(tmp_path / "fused", tmp_path / "apart") == pytest.approx(0.01, rel=1e-4)
    make_trial(tmp_path / "fused" / "r16", [1.0], 1.0)
    with pytest.raises(AssertionError, match="other trials"):
        sweep.largest_distance(tmp_path / "fused", tmp_path / "apart")


def test_a_sweep_that_was_not_fused_is_no_figure_of_one(tmp_path: Path) -> None:
    sweep.check_fused(tmp_path, wanted=False)
    with pytest.raises(SystemExit, match="0 fused groups"):
        sweep.check_fused(tmp_path, wanted=True)
    group = tmp_path / ".together" / "d" / "group.json"
    group.parent.mkdir(parents=True)
    group.write_text("{}")
    sweep.check_fused(tmp_path, wanted=True)
    with pytest.raises(SystemExit, match="1 fused groups"):
        sweep.check_fused(tmp_path, wanted=False)


@pytest.mark.parametrize("tiny", [True, False])
def test_what_is_typed_makes_the_trials(tiny: bool, tmp_path: Path) -> None:
    grid = sweep.overrides(tiny, sweep.STEPS, sweep.TRIALS)
    _, trials = plan_sweep([*grid, f"run.dir={tmp_path}", "run.name=s"])
    settings = {(trial.config.method.r, trial.config.optim.learning_rate) for trial in trials}
    assert settings == {(r, float(rate)) for r in sweep.RANKS for rate in sweep.RATES}
    assert {trial.config.batch.max_steps for trial in trials} == {sweep.STEPS}
    assert {trial.folder.parent for trial in trials} == {tmp_path / "s"}


def test_what_is_typed_for_the_winners_makes_nine_trials(tmp_path: Path) -> None:
    assert len(plan_sweep([*sweep.CHOICE, f"run.dir={tmp_path}"])[1]) == 9


def test_the_memory_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    child = f"x = bytearray({200 * MIB}); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(0.8)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('said')"
    used = _tree.run_watched([sys.executable, "-c", parent], tmp_path / "log", tmp_path, {})
    assert 200 * MIB < used.peak_bytes < 300 * MIB
    assert used.seconds > 0.8
    assert (tmp_path / "log").read_text() == "said\n"


def test_a_command_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such thing"):
        _tree.run_watched([sys.executable, "-c", "raise SystemExit('no such thing')"], tmp_path / "log", tmp_path, {})


def made_up(**sides: tuple[float, float, int]) -> dict[str, Any]:
    """Return a turn: of each side seconds, seconds of steps, peak bytes."""
    return {
        side: {
            "seconds": wall,
            "step_seconds": steps,
            "peak_bytes": peak,
            "eval_losses": {"r4": 0.5 if side == "apart" else 0.501},
            "distance": 2e-6,
        }
        for side, (wall, steps, peak) in sides.items()
    }


def test_the_page_holds_medians_of_each_turns_ratio_against_the_bars() -> None:
    turns = [
        made_up(apart=(100.0, 60.0, 1000), forked=(80.0, 60.0, 1200), fused=(50.0, 20.0, 1600), asha=(40.0, 9.0, 1600)),
        made_up(apart=(200.0, 90.0, 1000), forked=(90.0, 90.0, 1200), fused=(80.0, 30.0, 1500), asha=(50.0, 9.0, 1600)),
        made_up(apart=(90.0, 60.0, 1000), forked=(70.0, 60.0, 1200), fused=(30.0, 20.0, 1700), asha=(30.0, 9.0, 1600)),
    ]
    choices = [
        {"seed": 0, "grid_winner": "a", "asha_winner": "a", "grid_losses": {"a": 1.0, "b": 2.0}},
        {"seed": 1, "grid_winner": "a", "asha_winner": "b", "grid_losses": {"a": 1.0, "b": 2.0}},
    ]
    found = {"date": "2000-01-01", "cores": 2, "load": 1.0, "model": "M", "steps": 30, "trials": 8, "min_steps": 3}
    text = _sweep_page.page({**found, "turns": turns, "choices": choices})
    assert "over that of the fused sweep | **2.50 ×** | ≥ 2 × | yes |" in text
    assert "over that of one lone run | **1.60 ×** | ≤ 1.5 × | **no** |" in text
    assert "stopped early | **3.00 ×** | ≥ 3.4 × | **no** |" in text
    assert "of the same stopped early | 1.25 × | | |" in text
    assert "one process | 50 | 50, 80, 30 | 20.0 | 3.00 × | 0.00 |" in text
    assert "- fused: adapters within 2.0e-06" in text
    assert "held-out losses within 1.0e-03" in text
    assert "**1 of 2** seeds" in text
    assert "| 1 | a | 1.0000 | b | 2.0000 | 2 |" in text
    assert "|" not in _sweep_page.page({**found, "turns": [], "choices": []})


def test_the_page_of_some_sides_has_their_figures() -> None:
    found = {"date": "2000-01-01", "cores": 2, "load": 1.0, "model": "M", "steps": 4, "trials": 2, "min_steps": 1}
    text = _sweep_page.page({**found, "turns": [made_up(apart=(10.0, 6.0, 1000))], "choices": []})
    assert "one after the other | 10 | 10 | 6.0 | 1.00 × |" in text
    assert "| bar |" not in text
    assert "- fused" not in text


def method_runs() -> list[dict[str, Any]]:
    """Return rows of compare.csv over two seeds: the base, one method that finished twice, one that failed once."""
    rows = []
    for seed in (0, 1):
        common = {"learning_rate": "0.001", "peak_memory_bytes": str(2**30), "tried": "{}", "folder": "f", "error": ""}
        scores = {"eval_loss": str(0.5 + seed), "exact_match": str(0.25 + 0.5 * seed)}
        rate = "" if seed == 0 else " optim.learning_rate=0.001"
        lora = {**common, **scores, "method": f"lora r=8{rate}", "status": "finished"}
        full = {**common, **scores, "method": f"full{rate}", "status": "finished"}
        if seed == 1:
            full |= {"status": "failed", "error": "no memory", "eval_loss": "", "exact_match": ""}
        base = {**dict.fromkeys(common, ""), **scores, "method": "no training", "status": "base"}
        rows += [methods.as_record(row, seed) for row in (base, lora, full)]
    return rows


def test_methods_are_means_over_seeds_with_their_spread() -> None:
    found = {record["method"]: record for record in methods.over_seeds(method_runs())}
    assert list(found) == ["no training", "lora r=8", "full"]
    lora = found["lora r=8"]
    assert (lora["exact_match"], lora["eval_loss"], lora["seeds"]) == (0.5, 1.0, 2)
    assert lora["exact_match_spread"] == pytest.approx(0.5 / 2**0.5)
    assert (found["full"]["exact_match"], found["full"]["exact_match_spread"], found["full"]["seeds"]) == (
        0.25,
        None,
        1,
    )
    assert found["no training"]["learning_rate"] is None


def test_the_table_of_methods_shows_means_and_spreads_and_every_run(tmp_path: Path) -> None:
    methods.write(tmp_path, method_runs(), "Words.")
    text = (tmp_path / "methods.md").read_text()
    assert text.startswith("Words.\n\n| method | learning rate |")
    assert "| lora r=8 | 0.001 | 1.00 GiB | 1.0000 ± 0.7071 | 0.5000 ± 0.3536 | 2 |" in text
    assert "| 0.5000 | 0.2500 | 1 |" in text
    assert "- full, seed 1: no memory" in text
    assert len((tmp_path / "methods.csv").read_text().splitlines()) == 7
    with_bars = (tmp_path / "methods.png").read_bytes()
    records = methods.over_seeds(method_runs())
    comparison.draw(tmp_path / "plain.png", records)
    assert with_bars != (tmp_path / "plain.png").read_bytes()
