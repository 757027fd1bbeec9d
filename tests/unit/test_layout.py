"""The layout holds: imports run one way, files and functions stay small, nothing names a machine's own paths.

A *room* is a module or package directly under ``trainer/`` (``trainer/data/batching/trie.py`` is in the room ``data``). Imports
inside functions count like any other: a cycle hidden in a function is still a cycle.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

# Lowest first. A room may import from itself, from every room in a lower row, and from the neighbours in NEIGHBOURS.
ROWS = (
    ("errors", "config", "distributed", "quiet", "disk"),
    ("data", "loss", "optim", "methods", "signals", "heartbeat", "tracking", "fetch"),
    (
        *(
            "short_attention",
            "norms",
            "layers",
            "attention",
            "model",
            "engine",
            "resources",
            "state",
            "allocation",
            "seal",
        ),
        "checkpoint",
    ),
    (
        *("loop", "watch", "evaluate", "choices", "texts", "generate", "fold", "merge", "card", "runs", "proof"),
        *("view", "loaded"),
    ),
    ("train", "final", "inference", "chat"),
    ("report", "verbs"),
    ("cli",),
)
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}
# Importer -> the rooms of its own row that it may import. One way only: no pair stands here in both directions.
NEIGHBOURS = {
    "config": {"errors"},
    "disk": {"errors"},
    "distributed": {"errors"},
    "loss": {"data"},
    "attention": {"short_attention"},
    "model": {"attention", "norms"},
    "engine": {"attention"},
    "state": {"engine"},
    "allocation": {"engine", "state"},
    "checkpoint": {"allocation", "engine", "seal", "state"},
    "loop": {"evaluate", "generate", "watch"},
    "evaluate": {"choices", "generate", "texts"},
    "merge": {"fold"},
    "card": {"merge"},
    "train": {"final"},
}
LAUNCH_MAY_IMPORT = {"config", "errors"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MACHINE_PATH = re.compile(r"(?<![\w.{}$~-])/(?:home|root|Users|work|opt/pypi)/\w")


def sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the file imports, at any depth, by statement or by
    ``import_module("constant")``. ``from a import b`` gives ``a.b``: b may be a module."""
    package = module_name(path, root).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else []
                start = ".".join([*above, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def room_of(name: str) -> str:
    """``trainer.data.batching.trie`` -> ``data``; the package itself -> ``trainer``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def may_import(importer: str, target: str) -> bool:
    if target in (importer, "__version__"):
        return True
    if importer not in LEVEL or target not in LEVEL:
        return False
    return LEVEL[target] < LEVEL[importer] or target in NEIGHBOURS.get(importer, ())


def wrong_imports(root: Path = ROOT) -> list[str]:
    wrong = []
    for path in sorted([*(root / "trainer").rglob("*.py"), *(root / "launch").rglob("*.py")]):
        importer = module_name(path, root)
        room = room_of(importer)
        for line, name in imported(path, root):
            top = name.split(".")[0]
            if importer.startswith("launch"):
                fine = top != "trainer" or room_of(name) in LAUNCH_MAY_IMPORT
            elif top == "launch":
                fine = room == "cli"
            else:
                fine = top != "trainer" or may_import(room, room_of(name))
            if not fine:
                wrong.append(f"{path.relative_to(root)}:{line}: {importer} imports {name}")
    return wrong


def test_imports_run_one_way() -> None:
    assert wrong_imports() == []


def test_every_room_has_a_place() -> None:
    rooms = {room_of(module_name(path)) for path in sources("trainer")} - {"trainer", "__main__"}
    assert rooms <= set(LEVEL), f"not in ROWS: {sorted(rooms - set(LEVEL))}"


def test_neighbours_run_one_way() -> None:
    for importer, targets in NEIGHBOURS.items():
        for target in targets:
            assert LEVEL[importer] == LEVEL[target], f"{importer} -> {target}: not of one row, so not needed here"
            assert importer not in NEIGHBOURS.get(target, ()), f"{importer} <-> {target}"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("trainer/errors.py", "from trainer.config import load"),
        ("trainer/data/batching/trie.py", "def late():\n    from trainer.models.loading import load"),
        ("trainer/data/batching/trie.py", "def late():\n    from .. import engine"),
        ("trainer/kernels/label_loss.py", "import importlib\nimportlib.import_module('trainer.training.loop')"),
        ("trainer/training/loop.py", "import trainer.train"),
        ("trainer/train.py", "from launch import slurm"),
        ("launch/slurm.py", "from trainer import model"),
        ("trainer/lost.py", "from trainer import errors"),
    ],
)
def test_the_check_itself_finds(file: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize("module", ["trainer.errors", "trainer.config", "launch"])
def test_torch_is_not_loaded_by(module: str) -> None:
    """Wrong keys and launches answer at once, also on a login node without torch: nothing here loads it, however
    deep. ``launch`` means each of its modules."""
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").is_file():
        assert sources(module.replace(".", "/")), f"{module} is missing"
    names = [module, *(module_name(path) for path in sources("launch"))] if module == "launch" else [module]
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
