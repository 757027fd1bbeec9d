"""Completion, typed into a real bash and a real zsh."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.shells import Shell, missing
from trainer.cli.completion import complete_override
from trainer.config import groups, keys

COMPLETED = [
    ("afina tra", "afina train "),
    ("afina train --dr", "afina train --dry-run "),
    ("afina train optim.lea", "afina train optim.learning_rate="),  # no space: the value follows
    ("afina train method=qlora_", "afina train method=qlora_8bit "),
    ("afina train model=tiny zero=stage2_", "afina train model=tiny zero=stage2_offload "),
    ("afina train method=dora,qlora_", "afina train method=dora,qlora_8bit "),
    ("afina train checkpoint.every_epoch=t", "afina train checkpoint.every_epoch=true "),
    ("afina eval runs/sec", "afina eval runs/second "),
    ("afina eval second eval.max", "afina eval second eval.max_rows="),
    ("afina data data.path=my_r", "afina data data.path=my_rows.jsonl "),
    ("afina train --config my_c", "afina train --config my_config.yaml "),
]


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    if why := missing(request.param):
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("completion")
    for name in ("first", "second"):
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "config.yaml").touch()
    (folder / "my_rows.jsonl").touch()
    (folder / "my_config.yaml").touch()
    started = Shell(request.param, folder)
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "line"), COMPLETED, ids=[typed for typed, _ in COMPLETED])
def test_a_tab_completes(typed: str, line: str, shell: Shell) -> None:
    assert shell.complete(typed) == line


@pytest.mark.slow
def test_what_there_is_to_choose_from_is_listed(shell: Shell) -> None:
    shown = shell.listed("afina train zero=")
    assert [option for option in groups()["zero"] if option not in shown] == []
    assert "smollm2_135m" in shell.listed("afina fetch ")


def test_every_group_section_and_key_is_offered() -> None:
    names = [name for name, _ in complete_override("")]
    assert {f"{group}=" for group in groups()} <= set(names)
    assert {f"{key.name.split('.')[0]}." for key in keys()} <= set(names)
    assert {f"{key.name}=" for key in keys()} == {name for name, _ in complete_override("optim.lea")}
    assert [name for name, _ in complete_override("rank=")] == [f"rank={each}" for each in (*groups()["rank"], "null")]
    assert complete_override("optim.learning_rate=") == []
    assert complete_override("nosuch=") == []


def test_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from trainer.cli.completion import *; complete_override('optim.l'); complete_override('zero=');"
        "complete_run(''); complete_folder(''); complete_embedded('');"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]", answer.stderr


def test_completion_can_be_shown_without_a_verb(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.cli", "--show-completion"]
    done = subprocess.run(["bash", "-c", f"{' '.join(command)}; true"], cwd=ROOT, capture_output=True, text=True)
    assert "complete -o default -F _afina_completion afina" in done.stdout
