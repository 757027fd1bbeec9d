"""The verbs: what they print, what they refuse, how they exit."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import trainer.cli.app
import trainer.config
from tests.helpers.docs import bare_brackets
from tests.helpers.processes import ROOT
from tests.unit.test_docs import check_command
from trainer.cli.app import VERBS
from trainer.cli.folders import find_run
from trainer.cli.help import EXAMPLES, PANELS
from trainer.config import load, run_folder, to_yaml

Capture = pytest.CaptureFixture[str]


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, trainer.cli.app; code = trainer.cli.app.main(['--help']);"
        "print([name for name in ('torch', 'transformers', 'hydra', 'launch.sweep.sweep') if name in sys.modules],"
        " code)"
    )
    begin = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    seconds = time.perf_counter() - begin
    assert answer.stdout.splitlines()[-1] == "[] 0", answer.stderr
    # 0.3 s on a free core; the bound allows for a busy machine and is still far below an import of torch
    assert seconds < 3


def test_every_verb_has_help_with_an_example_in_80_columns(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for verb in VERBS:
        assert trainer.cli.app.main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: afina {verb}" in shown
        assert f" Examples:\n   afina {verb}" in shown
        assert max(map(len, shown.splitlines())) <= 80
        assert bare_brackets(shown.split("Examples:")[1]) == []


def test_the_examples_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    for verb, examples in EXAMPLES.items():
        for example in examples if verb in VERBS else ():
            check_command(shlex.split(example.partition(" > ")[0]))


def test_no_summary_is_cut(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert trainer.cli.app.main([]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "..." not in shown.partition("Usage")[2].partition("\n")[2]
    for verb, function in VERBS.items():
        summary = (function.__doc__ or "").split("\n\n")[0]
        assert any(line.strip("│ ").split() == [verb, *summary.split()] for line in shown.splitlines()), verb
    for panel in PANELS.values():
        assert f"─ {panel} ─" in shown


def test_train_help_lists_the_groups(capsys: Capture) -> None:
    assert trainer.cli.app.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("   afina train ") == 3
    words = shown.split("Groups of the config")[1].replace(",", " ").split()
    assert [name for name, options in trainer.config.groups().items() if not {name, *options} <= set(words)] == []


def test_the_version_is_one_line_and_quick(capsys: Capture) -> None:
    assert trainer.cli.app.main(["--version"]) == 0
    assert re.fullmatch(r"afina \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)
    code = (
        "import sys, trainer.cli.app; trainer.cli.app.main(['--version']);"
        "print('torch' in sys.modules, 'hydra' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["trian"], 2, "Did you mean 'train'?"),
        (["train", "--foo"], 2, "--foo"),
        (["train", "debug=tiny", "method.rr=4"], 2, "method.r"),
        (["train", "debug=tiny", "+foo=1"], 2, "foo"),
        (["train", "debug=tiny", "~method"], 2, "~method"),
        (["train", "debug=tiny", "method.r=4,8"], 2, "afina sweep method.r=4,8"),
        (["train", "debug=tiny", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "-m", "debug=tiny"], 2, "no key has several values"),
        (["sweep", "debug=tiny", "method.r=4,-1"], 2, "method.r"),
        (["config", "model=nosuch"], 2, "nosuch"),
        (["fetch", "nosuch"], 2, "nosuch"),
        (["eval", "nosuch"], 3, "is not a run folder"),
        (["generate", "nosuch", "hello"], 3, "is not a run folder"),
        (["generate", "nosuch"], 2, "PROMPT"),
        (["chat", "nosuch"], 3, "is not a run folder"),
        (["chat", "nosuch", "--bits", "5"], 2, "--bits=5"),
        (["chat", "nosuch", "--adapter"], 2, "--adapter"),
        (["generate", "nosuch", "hello", "--bits", "5"], 2, "--bits=5"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], code: int, told: str, capsys: Capture) -> None:
    assert trainer.cli.app.main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert told in shown.err


def test_the_nearest_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    folder = tmp_path / "runs" / "tiny-lora-0541f629"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load(["debug=tiny"])))
    monkeypatch.chdir(tmp_path)
    assert trainer.cli.app.main(["eval", "runs/tiny-lora-0541f628"]) == 3
    assert "did you mean runs/tiny-lora-0541f629?" in capsys.readouterr().err
    assert find_run("tiny-lora-0541f629") == Path("runs/tiny-lora-0541f629")
    assert find_run(str(folder)) == folder


def test_config_prints_yaml_that_repeats_the_run(tmp_path: Path, capsys: Capture) -> None:
    assert trainer.cli.app.main(["config", "debug=tiny", "method.r=3"]) == 0
    shown = capsys.readouterr().out
    assert f"# model: {trainer.config.conf_dir()}/model/tiny.yaml" in shown.splitlines()
    assert yaml.safe_load(shown)["method"]["r"] == 3
    file = tmp_path / "config.yaml"
    file.write_text(shown)
    assert load([], file) == load(["debug=tiny", "method.r=3"])
    assert trainer.cli.app.main(["config", "--config", str(file), "method.r=5"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(f"# all: {file}\n")
    assert yaml.safe_load(again)["method"]["r"] == 5


@pytest.mark.parametrize("launch", ["here", "torchrun"])
def test_a_dry_run_tells_all_and_starts_nothing(
    launch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["debug=tiny", f"launch={launch}"]
    assert trainer.cli.app.main(["train", "--dry-run", *overrides]) == 0
    shown = capsys.readouterr().out
    assert f"# in folder: {run_folder(load(overrides))}" in shown.splitlines()
    assert ("trainer.torchrun" in shown) == (launch == "torchrun")
    assert "-m trainer.train debug=tiny" in shown
    assert yaml.safe_load(shown)["model"]["name_or_path"] == "tiny"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [["sweep"], ["train", "-m"], ["train", "--multirun"]])
def test_a_dry_sweep_lists_its_runs(
    verb: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer.cli.app.main([*verb, "debug=tiny", "method.r=2,4", "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("# sweep of 2 runs in runs/sweep-")
    assert [line for line in shown[1:] if line.startswith("#")] == [
        *("# r2", "# r4", "# together in one process (sweep.fuse=auto): r2, r4"),
    ]
    assert list(tmp_path.iterdir()) == []


def test_fetch_lists_and_ends_with_the_folder(session_cache: Path, capsys: Capture) -> None:
    assert trainer.cli.app.main(["fetch"]) == 0
    assert "tiny" in capsys.readouterr().out.split()
    assert trainer.cli.app.main(["fetch", "tiny"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert (folder / "config.json").is_file()
    assert folder.is_relative_to(session_cache)


def test_version_names_what_numbers_depend_on(capsys: Capture) -> None:
    assert trainer.cli.app.main(["version"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:3] == ["afina", "python", "torch"]
    assert {"deepspeed", "peft", "transformers"} <= set(names)


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "import sys, trainer.cli.app; sys.exit(trainer.cli.app.main(['config', '--keys']))"
    command = f'{sys.executable} -c "{code}" | head -n 1'
    answer = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.startswith("model.name_or_path = ")
    assert answer.stderr == ""
