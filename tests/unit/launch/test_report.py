"""What `afina report` reads and ranks: folders of every kind, finished or not, whole or broken."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from launch.report import rows, words
from launch.report.curves import thinned
from launch.report.gather import Report, gather
from launch.report.log_file import read_log
from launch.report.ranking import Spread, rank_settings, spread
from launch.report.runs import Run
from launch.report.svg import Scale, scale, ticks_text
from launch.report.values import differing_keys, independent, ordered, parse_value, show
from launch.report.write import report
from tests.helpers.report_folders import BASE_LOSS, write_comparison, write_csv, write_run, write_sweep
from trainer.cli import main
from trainer.errors import CheckpointError, ConfigError
from trainer.tracking.files import read_metrics, read_summary

BROKEN = [b"", b"\xff\x00{", b"[1, 2]", b'{"step": "x"}\n[]\nnull\n', b'{"step": 1, "loss": NaN}\n']


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two restarts, a sweep over rank and alpha, one with three seeds each, a comparison."""
    out = tmp_path_factory.mktemp("report")
    write_run(out / "demo", final=0.2249, exact_match=0.7734, restarts=[9, 17], skipped=[12], steps=30)
    write_sweep(out / "sweep", ranks=(8, 16, 32), alphas=(16, 32), steps=20)
    write_sweep(out / "seeds", ranks=(8, 16), alphas=(16, 32), seeds=(0, 1, 2), steps=20)
    write_comparison(out / "comparison")
    return out


def eval_loss(folder: Path) -> float:
    summary = read_summary(folder)
    assert summary is not None
    value: float = summary["metrics"]["eval_loss"]
    return value


def cells(found: Report, head: str) -> list[Any]:
    header, lines = rows.table(found)
    return [line[header.index(head)].value for line in lines]


def test_which_kind_a_folder_is(folders: Path) -> None:
    kinds = {name: gather(folders / name).kind for name in ("demo", "sweep", "seeds", "comparison")}
    assert kinds == {"demo": "run", "sweep": "sweep", "seeds": "sweep", "comparison": "comparison"}


def test_the_figures_of_a_run_are_those_of_its_files(folders: Path) -> None:
    found = gather(folders / "demo")
    (record,) = rows.records(found)
    summary, steps = read_summary(folders / "demo"), [m for m in read_metrics(folders / "demo") if "step_seconds" in m]
    assert summary is not None
    for name in ("eval_loss", "exact_match"):
        assert record[name] == summary["metrics"][name]
        assert record[f"{name}_before"] == summary["metrics"][f"{name}_before"]
    assert record["peak_memory_bytes"] == max(step["peak_memory_bytes"] for step in steps)
    speed = sum(step["useful_tokens"] for step in steps) / sum(step["step_seconds"] for step in steps)
    assert record["useful_tokens_per_second"] == pytest.approx(speed, rel=1e-12)
    assert (record["seconds"], record["steps"], record["status"]) == (summary["wall_seconds"], 30, "finished")
    assert words.result(found).startswith(
        "Finished: eval_loss 3.2488 → 0.2249 and exact_match 0.0000 → 0.7734 after 30"
    )


def test_a_sweep_is_ranked_by_what_its_runs_ended_with(folders: Path) -> None:
    found = gather(folders / "sweep")
    losses = {path.parent.name: eval_loss(path.parent) for path in (folders / "sweep").glob("*/summary.json")}
    assert [run.name for run in found.runs] == sorted(losses, key=lambda name: losses[name])
    assert cells(found, "eval loss") == sorted(losses.values())
    assert cells(found, "#") == [1, 2, 3, 4, 5, 6]
    best = found.settings[0]
    assert words.result(found) == (
        f"Best: r={best.values['method.r']} alpha={best.values['method.alpha']:g}, "
        f"eval_loss {BASE_LOSS:.4f} → {min(losses.values()):.4f}."
    )


def test_a_sweep_is_the_same_without_its_table(folders: Path, tmp_path: Path) -> None:
    write_sweep(tmp_path / "s", ranks=(8, 16, 32), alphas=(16, 32), steps=20)
    (tmp_path / "s" / "sweep.csv").unlink()
    with_table, without = gather(folders / "sweep"), gather(tmp_path / "s")
    assert without.kind == "sweep"
    assert set(without.axes) == set(with_table.axes) == {"method.r", "method.alpha"}
    assert [run.name for run in without.runs] == [run.name for run in with_table.runs]


def test_the_spread_over_seeds_is_mean_and_sample_deviation(folders: Path) -> None:
    found = gather(folders / "seeds")
    assert found.has_repeats
    assert len(found.settings) == 4
    for setting in found.settings:
        assert setting.runs[0].folder is not None
        stem = setting.runs[0].folder.name.rpartition("_seed")[0]
        losses = [eval_loss(folders / "seeds" / f"{stem}_seed{seed}") for seed in range(3)]
        spread = setting.spread("eval_loss")
        assert spread is not None
        assert (spread.mean, spread.count) == (pytest.approx(statistics.fmean(losses)), 3)
        assert spread.deviation == pytest.approx(statistics.stdev(losses))
    means = cells(found, "eval loss")
    assert means == sorted(means)
    header, lines = rows.table(found)
    first = found.settings[0].spread("eval_loss")
    assert first is not None
    assert lines[0][header.index("eval loss")].text == f"{first.mean:.4f} ± {first.deviation:.4f}"
    assert f"(mean of 3 seeds, ± {first.deviation:.4f})" in words.result(found)


def test_a_spread_needs_every_value() -> None:
    assert spread([1.0, 3.0]) == Spread(2.0, pytest.approx(2**0.5), 2)
    assert spread([2.0]) == Spread(2.0, None, 1)
    assert spread([]) is None
    assert spread([1.0, None]) is None


def test_runs_rank_by_their_own_best_metric(tmp_path: Path) -> None:
    for name, loss, match in (("a", 0.2, 0.5), ("b", 0.3, 0.9), ("c", 0.4, 0.7)):
        rank = {"a": 4, "b": 8, "c": 16}[name]
        asked = [
            f"method.r={rank}",
            "eval.metrics=[loss,exact_match]",
            "eval.best_metric=exact_match",
            "eval.every_steps=2",
        ]
        write_run(tmp_path / name, asked, final=loss, exact_match=match, steps=10)
    found = gather(tmp_path)
    assert (found.metric, [run.name for run in found.runs]) == ("exact_match", ["b", "c", "a"])


def test_runs_that_do_not_finish_are_not_ranked(tmp_path: Path) -> None:
    write_run(tmp_path / "done", ["method.r=4"], final=0.5, steps=10)
    write_run(tmp_path / "broken", ["method.r=8"], final=0.1, steps=10, status="failed", error="row 3 | is empty")
    write_run(tmp_path / "going", ["method.r=16"], final=0.1, steps=10, status=None)
    failed = {"rank": "", "method.r": 32, "status": "failed", "folder": "runs/x/refused", "error": "no such file"}
    write_csv(tmp_path / "sweep.csv", [failed])
    found = gather(tmp_path)
    statuses = {run.name: (run.status, run.error) for run in found.runs}
    assert statuses == {
        "done": ("finished", None),
        "broken": ("failed", "row 3 | is empty"),
        "going": ("unfinished", None),
        "refused": ("failed", "no such file"),
    }
    assert found.runs[0].name == "done"
    assert [setting.rank for setting in found.settings] == [1, None, None, None]
    assert "1 of 4 runs finished, 2 failed, 1 unfinished." in words.more(found)
    values = {record["run"]: record["method.r"] for record in rows.records(found)}
    assert values == {"done": 4, "broken": 8, "going": 16, "refused": 32}


def test_a_run_that_goes_on_shows_what_it_has_so_far(tmp_path: Path) -> None:
    found = gather(write_run(tmp_path / "going", status=None, steps=40))
    scored = [line["eval_loss"] for line in read_metrics(tmp_path / "going") if "eval_loss" in line]
    (record,) = rows.records(found)
    assert (record["eval_loss"], record["rank"], record["steps"]) == (scored[-1], None, 24)
    assert words.result(found).startswith("Not finished (unfinished): eval_loss 3.2488 → ")
    assert "24 steps of 40" in words.result(found)


def test_finished_runs_without_a_score_say_so(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = write_run(tmp_path / name, [f"method.r={4 if name == 'a' else 8}"], steps=4)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "metrics": {}, "train_loss": None}))
    found = gather(tmp_path)
    assert words.result(found) == "No finished run has a score to rank it by: 2 of 2 runs finished."
    assert words.more(found) == []


def test_the_same_run_once_more_is_no_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, final=0.3 if name == "a" else 0.4, steps=4)
    write_run(tmp_path / "c", ["method.r=4"], final=0.5, steps=4)
    found = gather(tmp_path)
    assert "(mean of 2 runs, ± 0.0707)" in words.result(found)
    assert words.title(found).startswith("runs "), "no sweep made this folder"


def test_a_comparison_names_its_methods_and_why_one_is_missing(folders: Path) -> None:
    found = gather(folders / "comparison")
    assert [run.name for run in found.runs[:3]] == ["full", "dora", "lora r=16"]
    assert {run.name: run.status for run in found.runs[-2:]} == {"adalora": "failed", "dora bits=8": "refused"}
    assert found.before("eval_loss") == BASE_LOSS
    peaks = dict(zip([run.name for run in found.runs], cells(found, "peak memory")))
    assert "dora is 4.1 % behind with 3.40 GiB instead of 9.60." in words.more(found)
    assert peaks["dora"] / 2**30 == pytest.approx(3.4, abs=0.01)
    assert found.runs[4].tried == {"0.0001": pytest.approx(0.3391), "0.0002": pytest.approx(0.2891)}


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.jsonl", "log.txt", "environment.json"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00{", b"[1, 2]", b'{"step": "x"}\n[]\nnull\n', b'{"step": 1, "loss": NaN}\n']
)
def test_no_file_of_a_run_can_stop_a_report(file: str, content: bytes, tmp_path: Path) -> None:
    from launch.report.page import render

    folder = write_run(tmp_path / "run", steps=8, samples=False)
    (folder / file).write_bytes(content)
    found = gather(folder)
    assert "<h1" in render(found)
    words.result(found)
    rows.table(found)
    (folder / file).unlink()
    assert "<h1" in render(gather(folder))


@pytest.mark.parametrize(
    "summary",
    [
        {"status": 3, "steps": "many", "metrics": [1], "error": "why", "wall_seconds": {}},
        {"status": "finished", "metrics": {"eval_loss": "low", "eval_loss_before": True}, "trainable_parameters": []},
        {"status": "finished", "metrics": {"eval_loss": 10**400}, "train_loss": None, "total_parameters": 0},
    ],
)
def test_values_of_another_type_are_none(summary: dict[str, Any], tmp_path: Path) -> None:
    from launch.report.page import render

    folder = write_run(tmp_path / "run", steps=8)
    (folder / "summary.json").write_text(json.dumps(summary))
    found = gather(folder)
    assert found.runs[0].score("eval_loss") is None or found.runs[0].status == "3"
    assert "<h1" in render(found)


def test_a_damaged_line_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=8)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], "}{", *lines[4:]]) + "\n")
    (run,) = gather(folder).runs
    assert run.notes == [f"{folder / 'metrics.jsonl'}:4 is not a JSON object with a step"] or "4" in run.notes[0]
    assert run.score("eval_loss") is not None, "the summary has it"
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    (run,) = gather(folder).runs
    assert (run.notes, len(run.metrics)) == ([], len(lines)), "a torn last line is a run that is writing"


def test_the_log_is_read_as_lives_events_and_samples(folders: Path) -> None:
    log = read_log(folders / "demo" / "log.txt")
    assert [(event.kind, event.step) for event in log.events] == [
        ("stopped", 9),
        ("resumed", 9),
        ("warning", 11),
        ("killed", 17),
        ("resumed", 17),
        ("finished", 30),
    ]
    assert [life.step for life in log.lives] == [9, 17, 30]
    gaps = [after.begin - before.end for before, after in zip(log.lives, log.lives[1:])]
    assert gaps == [240, 240]
    assert sorted(log.samples) == [0, 30]
    before, after = log.samples[0][1], log.samples[30][1]
    assert before.prompt == after.prompt
    assert before.prompt.startswith("user\nIs this news headline sarcastic? Answer yes or no.\n\narea man wins")
    assert (after.reference, after.answer) == ("yes", "yes")
    assert log.facts["data"] == "1,200 rows to train on, 256 held out, from headlines.jsonl"


def test_an_answer_cannot_pass_for_a_line_of_the_log(tmp_path: Path) -> None:
    stamp = "2026-03-01T09:00:00+00:00"
    answer = f"{stamp} finished 3 steps".replace("\n", "\n" + " " * 13)
    text = (
        f"{stamp} sample 1\n  prompt     a\n             {stamp} run: x, resumed after step 9\n  answer     {answer}\n"
    )
    (tmp_path / "log.txt").write_text(f"{text}{stamp} step 3/9 loss 1\n")
    log = read_log(tmp_path / "log.txt")
    assert log.events == []
    assert log.samples[3][0].prompt == f"a\n{stamp} run: x, resumed after step 9"


def test_a_log_that_never_ends_is_bounded(tmp_path: Path) -> None:
    stamp = "2026-03-01T09:00:00+00:00"
    sample = "\n".join(f"sample {k}\n  prompt     p{k}\n  reference  r\n  answer     a" for k in range(1, 200))
    lines = [f"{stamp} {sample}", f"{stamp} step 1/9 loss 1", f"{stamp} run: x"]
    lines += [f"{stamp} warning: again"] * 300 + [f"{stamp} data: 1 rows to train on"] * 900
    (tmp_path / "log.txt").write_text("\n".join(lines) + "\n")
    log = read_log(tmp_path / "log.txt")
    assert (len(log.events), len(log.lives)) == (100, 500)
    assert [each.prompt for each in log.samples[1]] == [f"p{k}" for k in range(1, 21)]


def test_axes_that_follow_another_one_are_no_axes() -> None:
    points = [{"r": r, "alpha": 2 * r, "rate": rate, "fixed": 1} for r in (4, 8) for rate in (1e-4, 1e-3)]
    assert independent(["r", "alpha", "rate", "fixed"], points) == ["r", "rate"]


def test_values() -> None:
    assert [show(value) for value in (None, True, 2e-5, 16, "a b", ["x", 1])] == [
        "null",
        "true",
        "2e-05",
        "16",
        "a b",
        "[x, 1]",
    ]
    assert [parse_value(text) for text in ("16", "2e-05", "lora", "", None)] == [16, 2e-5, "lora", None, None]
    assert ordered([32, "auto", 4, 32, 8.5]) == [4, 8.5, 32, "auto"]
    assert differing_keys([{"a": 1, "b": 2}, {}, {"a": 1, "b": 3, "c": None}]) == ["b"]


def test_alpha_and_rate_that_follow_from_the_method_are_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ["method.r=4", "optim.learning_rate=null"], steps=4)
    (run,) = gather(tmp_path / "a").runs
    assert (run.config["method.alpha"], run.config["optim.learning_rate"]) == (8, 2e-4)


def test_long_curves_keep_their_spikes() -> None:
    points: list[tuple[int, float | None]] = [(step, 1.0 + step % 7 / 100) for step in range(10_000)]
    points[4321], points[77] = (4321, 99.0), (77, -5.0)
    kept = thinned(points, 300)
    assert len(kept) <= 310
    assert {(4321, 99.0), (77, -5.0)} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:200], 300) == points[:200]
    assert thinned([(step, None) for step in range(1000)], 10)[0] == (0, None)


def test_ticks_are_round_and_within() -> None:
    for low, high in ((0.0, 1.0), (0.2249, 0.3226), (1e-5, 2e-4), (3.0, 3.0), (-2.0, 7.0), (0, 1_000_000)):
        made = scale([low, high], 0, 100)
        ticks = made.ticks()
        assert 2 <= len(ticks) <= 10, (low, high, ticks)
        room = (made.high - made.low) * 1e-6
        assert all(made.low - room <= tick <= made.high + room for tick in ticks)
        assert len(set(ticks_text(ticks))) == len(ticks)
    logarithmic = Scale(0.1, 10, 0, 100, is_log=True)
    assert logarithmic(1.0) == pytest.approx(50)
    assert logarithmic.ticks() == [0.1, 0.2, 0.5, 1, 2, 5, 10]


def test_runs_of_one_name_are_one_setting_only_where_keys_tell_them_apart() -> None:
    runs = [Run("a", config={"k": 1}), Run("b", config={"k": 1}), Run("c", config={"k": 2})]
    assert [len(setting.runs) for setting in rank_settings(runs, ["k"], "eval_loss")] == [2, 1]
    assert [len(setting.runs) for setting in rank_settings(runs, [], "eval_loss")] == [1, 1, 1]


def test_the_verb_writes_page_and_numbers(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "s").symlink_to(folders / "sweep")
    written = report(Path("runs/s"), tmp_path / "out.html")
    assert written == [tmp_path / "out.html", tmp_path / "out.csv"]
    with written[1].open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["eval_loss"]) for line in lines] == sorted(float(line["eval_loss"]) for line in lines)
    assert float(lines[0]["eval_loss"]) == eval_loss(folders / "sweep" / lines[0]["run"])
    assert set(lines[0]) >= {"method.r", "method.alpha", "peak_memory_bytes", "folder", "error", "eval_loss_before"}
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Best: r=")
    assert [line.split()[0] for line in out[-6:]] == ["1", "2", "3", "4", "5", "6"]
    assert main(["report", "ss"]) == CheckpointError.exit_code
    assert "did you mean runs/s?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"must end in \.html"):
        report(Path("runs/s"), tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="there is no folder"):
        report(Path("runs/s"), tmp_path / "nowhere" / "out.html")


def test_a_name_cannot_send_codes_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows_of_it = [
        {"method": "lora\x1b[2J", "status": "failed", "tried": "{}", "folder": "", "error": "no\x1b]0;x\x07\nway"}
    ]
    write_csv(tmp_path / "compare.csv", rows_of_it)
    report(tmp_path)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "lora⟨U+001B⟩[2J" in out
