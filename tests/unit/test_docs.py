"""What README and docs/ name is there: files, links, verbs, options, overrides. Nothing here is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import launch.sweep.sweep
import trainer.config
from tests.helpers.docs import PAGES, anchors, bare_brackets, blocks, commands, links, prose
from tests.helpers.layout import FLOORS
from tests.helpers.processes import ROOT
from trainer.cli.app import app
from trainer.cli.keys import find_keys

MAX_README_LINES = 160
MAX_WIDTH = 120
TOPS = ("trainer", "launch", "conf", "slurm", "examples", "benchmarks", "tests", "docs")
WRITTEN = {"benchmarks/gpu.md"}  # by a command that is named there
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


@each_page
def test_lines_are_wrapped(page: Path) -> None:
    not_prose = ("|", "![", "Options: ")  # tables, pictures, and lists in docs/config.md, which is generated
    lines = [line for line in prose(page).splitlines() if not line.startswith(not_prose)]
    assert [line for line in lines if len(line) > MAX_WIDTH] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@each_page
def test_files_that_are_named_are_there(page: Path) -> None:
    named = set(re.findall(r"`([\w./*-]+)`", prose(page)))
    files = {name for name in named if name.split("/")[0] in TOPS and "/" in name and "NAME" not in name}
    files -= WRITTEN
    assert [name for name in sorted(files) if not any(ROOT.glob(name.rstrip("/")))] == []


def test_every_room_is_described() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = [room for floor in FLOORS for room in floor]
    names = [f"{room}/" if (ROOT / "trainer" / room).is_dir() else f"{room}.py" for room in rooms]
    assert [name for name in names if f"| `{name}` |" not in text] == []


@each_page
def test_verbs_that_are_named_are_there(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    named = {found for span in spans for found in re.findall(r"^(?:\$ )?afina ([a-z][a-z-]*)", span)}
    assert named - set(VERBS) == set()


def test_readme_names_every_verb() -> None:
    named = set(re.findall(r"\| `afina ([a-z][a-z-]*)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named == set(VERBS)


@each_page
def test_commands_could_be_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are parsed by the verb's own parser, overrides are composed and checked; make's targets are there."""
    monkeypatch.chdir(tmp_path)
    Path("runs/first/adapter").mkdir(parents=True)
    Path("runs/first/adapter/adapter_config.json").write_text("{}")
    for name in ("my.jsonl", "more.jsonl"):
        Path(name).touch()
    for place, words in commands(page):
        try:
            check_command(words)
        except Exception as error:
            pytest.fail(f"{place}: {' '.join(words)}: {error}")


def check_command(words: list[str]) -> None:
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), "no such target"
    elif words[0] == "afina":
        context = VERBS[words[1]].make_context(words[1], words[2:])
        overrides = list(context.params.get("overrides") or [])
        if context.params.get("keys"):
            find_keys(overrides)
        elif words[1] == "sweep":
            launch.sweep.sweep.plan_sweep(overrides)
        elif words[1] == "slurm-script":
            trainer.config.load(["launch=slurm", *overrides], with_data=False)
        elif words[1] in ("train", "compare", "config", "data"):
            trainer.config.load(overrides)
        else:
            trainer.config.load(["debug=tiny", *overrides])
    elif "trainer.train" in words:
        trainer.config.load(words[words.index("trainer.train") + 1 :])
    elif words[0] == "sbatch":
        trainer.config.load(words[words.index("slurm/train.sbatch") + 1 :])


@each_page
def test_lists_are_quoted_for_the_shell(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    typed = [block.text for block in blocks(page) if block.language == "bash"]
    assert [found for text in [*spans, *typed] for found in bare_brackets(text)] == []


def test_every_promise_of_security_names_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promised = text.split("## Not promised")[0]
    rows = [line for line in promised.splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    bullets = re.split(r"^- ", promised.split("## What is kept out")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
    installed = promised.split("## What is installed")[1]
    assert len(rows) >= 8
    assert len(bullets) >= 3
    for promise in [*rows, *bullets, installed]:
        named = re.findall(r"`(tests/[\w/]+\.py)`", promise)
        assert named, promise
        assert [path for path in named if not (ROOT / path).is_file()] == []
