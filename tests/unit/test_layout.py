"""The layout holds: imports run one way, files and functions stay small, nothing names a machine's own paths.

The table of rooms is in ``tests/helpers/layout.py``. Imports inside functions count like any other: a circle hidden in
a function is still a circle.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.layout import (
    FLOORS,
    LEVEL,
    NEIGHBOURS,
    circles,
    floors_as_markdown,
    module_name,
    room_of,
    sources,
    strongly_connected,
    wrong_imports,
)
from tests.helpers.processes import ROOT

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_FILES_AT_THE_TOP = 8
MACHINE_PATH = re.compile(r"(?<![\w.{}$~-])/(?:home|root|Users|work|opt/pypi)/\w")


def test_imports_run_one_way() -> None:
    assert wrong_imports() == []


def test_there_is_no_circle() -> None:
    assert circles() == []


def test_the_table_and_the_rooms_are_the_same() -> None:
    rooms = {room_of(module_name(path)) for path in sources("trainer")} - {"trainer"}
    assert rooms - set(LEVEL) == set(), "rooms without a place in FLOORS"
    assert set(LEVEL) - rooms == set(), "rooms of FLOORS that do not exist"
    assert sum(map(len, FLOORS)) == len(LEVEL), "a room stands on two floors"


def test_every_room_has_its_tests() -> None:
    """``tests/unit`` mirrors the rooms: a folder each, or a file where one is enough."""
    packages = {path.parent.name for path in (ROOT / "trainer").glob("*/__init__.py")} | {"launch"}
    modules = {path.stem for path in (ROOT / "trainer").glob("[!_]*.py")}
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.name for path in unit.glob("*/test_*.py")}
    files = {path.stem.removeprefix("test_") for path in unit.glob("test_*.py")}
    assert packages - folders - files == set(), "rooms without a test"
    assert folders - packages == set(), "folders of tests for no room"
    about_the_checkout = {"layout", "packaging", "docs", "words", "benchmarks", "gpu_campaign"}
    assert files - packages - modules - about_the_checkout == set(), "they belong to a room"


def test_neighbours_run_one_way() -> None:
    for importer, targets in NEIGHBOURS.items():
        for target in targets:
            assert LEVEL[importer] == LEVEL[target], f"{importer} -> {target}: not of one floor, so not needed here"
    assert strongly_connected(NEIGHBOURS) == []


def test_contributing_shows_the_table() -> None:
    assert floors_as_markdown() in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_few_files_stand_at_the_top() -> None:
    files = sorted(path.name for path in (ROOT / "trainer").glob("*.py"))
    assert len(files) <= MAX_FILES_AT_THE_TOP, files


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("trainer/errors.py", "from trainer.config import load"),
        ("trainer/data/batching/trie.py", "def late():\n    from trainer.models.loading import load"),
        ("trainer/data/batching/trie.py", "def late():\n    from ... import engine"),
        ("trainer/kernels/label_loss.py", "import importlib\nimportlib.import_module('trainer.training.loop')"),
        ("trainer/training/loop.py", "import trainer.train"),
        ("trainer/train.py", "from launch import slurm"),
        ("launch/slurm.py", "from trainer import models"),
        ("launch/slurm.py", "from trainer.tracking import tracker"),
        (
            "trainer/config/late.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainer.data import load",
        ),
        ("trainer/lost.py", "from trainer import errors"),
    ],
)
def test_the_check_itself_finds(file: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(wrong_imports(tmp_path)) == 1


def test_the_check_of_circles_itself_finds(tmp_path: Path) -> None:
    for folder, other in (("one", "two"), ("two", "one")):
        (tmp_path / "trainer" / folder).mkdir(parents=True)
        (tmp_path / "trainer" / folder / "__init__.py").write_text("")
        (tmp_path / "trainer" / folder / "a.py").write_text(f"import trainer.{other}.b\n")
        (tmp_path / "trainer" / folder / "b.py").write_text("")
    assert circles(tmp_path) == [["trainer.one", "trainer.two"]]
    (tmp_path / "trainer/two/b.py").write_text("if TYPE_CHECKING:\n    from trainer.one import a\n")
    assert ["trainer.one.a", "trainer.two.b"] in circles(tmp_path)


def test_torch_is_not_loaded_by_what_answers_at_once() -> None:
    """Wrong keys and launches answer at once, also on a login node without torch: nothing here loads it, however
    deep."""
    names = ["trainer.errors", "trainer.files", "trainer.config", *(module_name(path) for path in sources("launch"))]
    heavy = ("torch", "transformers", "deepspeed", "peft", "datasets", "wandb")
    code = f"import sys\nimport {', '.join(names)}\nprint(*[name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == []


def test_files_stay_small() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources("trainer", "launch")}
    long = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > MAX_FILE_LINES]
    assert long == [], f"over {MAX_FILE_LINES} lines a file has two jobs"


def test_functions_stay_small() -> None:
    long = []
    for path in sources("trainer", "launch"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert long == [], f"over {MAX_FUNCTION_LINES} lines, docstring included"


def test_no_machine_paths() -> None:
    found = []
    for folder in ("trainer", "launch", "conf", "slurm", "examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in {".py", ".yaml", ".yml", ".md", ".sh", ".sbatch", ".toml"}:
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if MACHINE_PATH.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
