"""`afina runs` and `afina show`: every kind of folder, whole, broken and being written, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.report.gather import gather
from launch.report.listing import list_runs
from launch.report.next_steps import next_commands
from launch.report.runs import Run, read_run
from launch.report.show import age
from launch.report.text_curve import ROWS, WIDTH, Look, loss_curve
from launch.slurm.submit import JOB_FILE
from tests.helpers.processes import ROOT
from tests.helpers.report_folders import BASE_LOSS, write_comparison, write_run, write_sweep
from trainer.checkpoint.owner import own_run, show_owner
from trainer.cli import main
from trainer.config import load

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "runs"
    write_run(folder / "demo", [f"run.dir={folder}"], final=0.2249, exact_match=0.7734, restarts=[9], steps=30)
    write_run(folder / "dead", [f"run.dir={folder}"], steps=30, status=None)
    write_run(folder / "stopped", steps=20, status="preempted")
    write_run(folder / "broken", [f"run.dir={folder}"], steps=30, status="failed", error="out of\nmemory: 3 GiB")
    write_sweep(folder / "sweep", ranks=(8, 16), alphas=(16,), steps=10)
    write_comparison(folder / "compared")
    (folder / "notes").mkdir()
    (folder / "file.txt").write_text("x")
    (folder / "queued").mkdir()
    (folder / "queued" / JOB_FILE).write_text("7\n")
    for name, file, content in (
        ("bad-config", "config.yaml", b"\xff{"),
        ("bad-list", "config.yaml", b"- 1\n"),
        ("bad-summary", "summary.json", b"[1]"),
        ("bad-metrics", "metrics.jsonl", b"nothing\nof ours\n"),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made.parent)
    return made


def listed(capsys: Capture, *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["runs", *arguments, "--json"]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_each_run_stands_as_its_files_say(folder: Path, capsys: Capture) -> None:
    found = listed(capsys)
    assert {name: (entry["kind"], entry["status"]) for name, entry in found.items()} == {
        "demo": ("run", "finished"), "dead": ("run", "unfinished"), "stopped": ("run", "preempted"),
        "broken": ("run", "failed"), "queued": ("run", "not run"), "sweep": ("sweep", "2 of 2 finished"),
        "compared": ("comparison", "8 of 9 finished, 1 failed"),
        **{f"bad-{name}": ("broken", "broken") for name in ("config", "list", "summary", "metrics")},
    }  # fmt: skip
    demo, dead = found["demo"], found["dead"]
    assert (demo["metric"], demo["score_before"], demo["score"], demo["step"]) == ("exact_match", 0.0, 0.7734, 30)
    assert (dead["metric"], dead["score_before"], dead["step"], dead["total_steps"]) == ("eval_loss", BASE_LOSS, 18, 30)
    assert dead["score"] == read_run(folder / "dead").score("eval_loss")
    assert demo["size_bytes"] == sum(file.stat().st_size for file in (folder / "demo").rglob("*") if file.is_file())
    assert found["sweep"]["score"] == min(read_run(f).score("eval_loss") or 9 for f in (folder / "sweep").glob("r*"))
    assert found["broken"]["reason"] == "out of\nmemory: 3 GiB"
    assert found["bad-config"]["reason"] == "config.yaml cannot be read as YAML"
    assert found["bad-metrics"]["reason"] == "metrics.jsonl holds no record of a step"


def test_the_list_of_another_folder_says_how_to_go_on_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    found = listed(capsys, str(folder))
    assert found["demo"]["next"] == f"afina chat {folder}/demo"
    assert found["dead"]["next"] == f"afina train --config {folder}/dead/config.yaml"
    # its config has another run.dir: the command that goes on must not begin a new run there
    typed = found["stopped"]["next"].split()
    assert typed[:3] == ["afina", "train", "--config"]
    config = load(typed[4:], Path(typed[3]), with_data=False)
    assert Path(config.run.dir, config.run.name or "") == folder / "stopped"
    assert found["sweep"]["next"] == f"afina report {folder}/sweep"
    assert found["queued"]["next"] == f"afina status {folder}/queued"
    assert found["bad-config"]["next"] is None


def test_the_one_that_is_trained_runs(folder: Path, capsys: Capture) -> None:
    with own_run(folder / "dead"), show_owner(folder / "dead"):
        dead = listed(capsys)["dead"]
    assert (dead["status"], dead["next"]) == ("running", "afina logs runs/dead --follow")


def test_in_a_pipe_a_run_is_a_line(folder: Path, capsys: Capture) -> None:
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "name"
    assert lines[0].endswith("how to go on")
    (demo,) = [line for line in lines if line.startswith("demo ")]
    assert re.split(r"  +", demo)[1:4] == ["finished", "30", "exact_match 0.0000 → 0.7734"]
    assert demo.endswith("afina chat runs/demo")
    assert "18/30" in next(line for line in lines if line.startswith("dead "))
    assert "broken: out of memory: 3 GiB" in lines


def test_what_is_no_folder_of_runs_is_said(tmp_path: Path, capsys: Capture) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 3
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"no runs in {tmp_path}")


def test_the_ends_of_long_files_are_enough(tmp_path: Path) -> None:
    write_run(tmp_path / "long", steps=2000, status=None)
    assert (tmp_path / "long" / "metrics.jsonl").stat().st_size > 300_000
    with (tmp_path / "long" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1201, "lo')  # being written
    (entry,) = list_runs(tmp_path)
    assert (entry.step, entry.total_steps, entry.score_before) == (1200, 2000, BASE_LOSS)


def test_show_says_what_came_out_and_what_comes_next(folder: Path, capsys: Capture) -> None:
    assert main(["show", "demo"]) == 0
    shown = capsys.readouterr().out
    lines = {re.split(r"  +", line.strip())[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert shown.startswith("runs/demo: finished, 30 steps, ")
    assert lines["exact_match"].endswith("0.0000 → 0.7734")
    assert lines["eval_loss"].endswith(f"{BASE_LOSS:.4f} → 0.2249")
    assert lines["method"].endswith("lora, r 16, alpha 32, learning rate 0.0002")
    assert lines["time"].endswith("57 s, in 2 processes one after the other")
    assert lines["memory"].endswith("2.36 GiB at most")
    assert "runs/demo/adapter, 23.8 KiB" in lines["adapter"]
    assert shown.endswith(
        "next:\n  afina chat runs/demo\n  afina merge runs/demo --to runs/demo-merged\n  afina report runs/demo\n"
    )
    assert "\033" not in shown


@pytest.mark.parametrize(
    ("name", "begins", "told"),
    [
        ("broken", "runs/broken: failed, 18 of 30 steps", "error       out of memory: 3 GiB"),
        ("dead", "runs/dead: unfinished, 18 of 30 steps", "afina train --config runs/dead/config.yaml"),
        ("stopped", "runs/stopped: preempted, 20 steps", "afina train --config runs/stopped/config.yaml run.dir=runs"),
        ("bad-config", "runs/bad-config: not run, no step", "cannot be read as YAML"),
        ("bad-summary", "runs/bad-summary: not run", "is not a JSON object"),
    ],
)
def test_show_of_a_run_that_did_not_end(folder: Path, capsys: Capture, name: str, begins: str, told: str) -> None:
    if name == "stopped":
        text = (folder / name / "config.yaml").read_text()
        (folder / name / "config.yaml").write_text(re.sub("dir: .*", "dir: elsewhere", text))
    assert main(["show", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(begins)
    assert told in shown


@pytest.mark.parametrize(("name", "told"), [("sweep", "is several runs"), ("compared", "is a comparison")])
def test_a_sweep_has_a_report(folder: Path, capsys: Capture, name: str, told: str) -> None:
    assert main(["show", name]) == 3
    shown = capsys.readouterr().err
    assert told in shown
    assert f"→ afina report runs/{name}" in shown


def test_show_of_no_run_names_the_list(folder: Path, capsys: Capture) -> None:
    assert main(["show", "nowhere"]) == 3
    assert "afina runs lists them" in capsys.readouterr().err


def test_the_curve_is_where_the_numbers_are() -> None:
    metrics = [{"step": 0, "eval_loss": 4.0}, {"step": 50, "loss": 2.0}, {"step": 100, "loss": 1.0, "eval_loss": 1.0}]
    for look, mark in ((Look(), "●"), (Look(is_unicode=False), "O")):
        lines = loss_curve(Run("x", metrics=metrics), look)
        assert max(map(len, lines)) <= WIDTH
        assert len(lines) == ROWS + 2
        drawn = lines[:ROWS]
        assert drawn[0].index(mark) == len(drawn[0]) - 1, "the first evaluation: left, on top"
        assert drawn[0].index(mark) < 10
        assert drawn[-1].rindex(mark) == WIDTH - 1, "the last one: right, at the bottom"
        assert lines[ROWS].split() == ["0", "step", "100"]
    assert "".join(lines).isascii()
    assert loss_curve(Run("x", metrics=[{"step": 3, "loss": float("nan")}]), Look()) == []
    assert len(loss_curve(Run("x", metrics=[{"step": 3, "loss": 0.0}]), Look())) == ROWS + 2


def test_a_spike_of_a_long_run_is_drawn() -> None:
    metrics = [{"step": step, "loss": 9.0 if step == 5000 else 1.0} for step in range(1, 10_001)]
    lines = loss_curve(Run("x", metrics=metrics), Look())
    assert lines[0].strip("┤ 0123456789."), "the top row has it"


def test_the_svg_needs_nothing_but_itself(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["show", "demo", "--svg", str(tmp_path / "curve.svg")]) == 0
    assert capsys.readouterr().out.endswith(f"written: {tmp_path}/curve.svg\n")
    root = xml.etree.ElementTree.parse(tmp_path / "curve.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    marks = root.findall(".//{*}circle/{*}title")
    assert len(marks) == sum(1 for line in gather(folder / "demo").runs[0].metrics if "eval_loss" in line)
    assert main(["show", "demo", "--svg", "curve.png"]) == 2
    assert "--svg=curve.png: must end in .svg → --svg curve.svg" in capsys.readouterr().err
    assert main(["show", "bad-summary", "--svg", str(tmp_path / "none.svg")]) == 3
    assert not (tmp_path / "none.svg").exists()


def on_terminal(work: Path, *arguments: str, columns: int = 80, **environment: str) -> str:
    """What a verb writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    place = {"PYTHONPATH": str(ROOT), "COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(
        [sys.executable, "-m", "trainer.cli", *arguments],
        cwd=work,
        env={**known, **place, **environment},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    ) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: _read(ours), b""))
        assert process.wait() == 0
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # what Linux says when nobody writes any more
        return b""


def test_on_a_terminal(folder: Path) -> None:
    plain: Callable[[str], str] = lambda text: re.sub(r"\033\[[\d;]*m", "", text)  # noqa: E731
    narrow, wide = (plain(on_terminal(folder.parent, "runs", columns=columns)) for columns in (80, 200))
    assert max(map(len, narrow.splitlines())) <= 80 or "afina" in max(narrow.splitlines(), key=len)
    assert "\ndemo: afina chat runs/demo\n" in narrow, "a command is never broken"
    assert re.search(r"│ demo +│ finished .*│ afina chat runs/demo +│", wide)
    coloured = on_terminal(folder.parent, "show", "demo")
    assert "\033[1;33m●" in coloured
    assert "\033" not in on_terminal(folder.parent, "show", "demo", NO_COLOR="1")
    ascii_only = on_terminal(folder.parent, "show", "demo", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert ascii_only.isascii()
    assert "0.0000 -> 0.7734" in ascii_only


def test_neither_loads_torch(folder: Path) -> None:
    code = (
        "import sys; from trainer.cli import main; codes = main(['runs']), main(['show', 'demo']);"
        "print([name for name in ('torch', 'transformers', 'datasets', 'wandb') if name in sys.modules], codes)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.splitlines()[-1] == "[] (0, 0)", answer.stderr


def test_wandbs_offline_run_is_synced(tmp_path: Path) -> None:
    write_run(tmp_path / "x", ["method=prompt"], steps=5)
    (tmp_path / "x" / "wandb" / "offline-run-1").mkdir(parents=True)
    found = next_commands(read_run(tmp_path / "x"))
    assert [command.split()[1] for command in found] == ["chat", "report", "sync"], "a prompt is not merged"


def test_times_and_sizes_are_short() -> None:
    assert [age(s) for s in (5, 70, 3700, 7300, 200_000)] == ["5 s", "1 min", "1 h", "2 h", "2 d"]
