"""The rooms of the program and the one table that says which may import which.

A *room* is a package or module directly under ``trainer/``. A *floor* is a row of the table; a room may import from
itself, from every room on a lower floor and from the rooms of its own floor that ``NEIGHBOURS`` allows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.processes import ROOT

# Highest first. CONTRIBUTING.md shows this table; `floors_as_markdown` writes it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("train", "torchrun", "serve_trials", "preflight", "cli", "api"),
    ("together",),
    ("training", "inference"),
    ("merge", "checkpoint"),
    ("engine", "view"),
    ("models",),
    ("kernels", "evaluation"),
    ("data", "methods", "tracking", "html"),
    ("config",),
    ("files", "errors", "redaction", "silence", "compat", "distributed"),
)
LEVEL = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Importer -> the rooms of its own floor that it may import; one way only.
NEIGHBOURS = {
    "cli": {"train"},
    "train": {"api"},
    "serve_trials": {"train"},
    "data": {"tracking"},
    "errors": {"redaction"},
    "files": {"errors"},
    "compat": {"errors"},
    "distributed": {"compat", "errors"},
}
# None of them loads torch.
LAUNCH_MAY_IMPORT = (
    "trainer.config",
    "trainer.distributed.rendezvous",
    "trainer.errors",
    "trainer.files",
    "trainer.html",
    "trainer.redaction",
    "trainer.tracking.files",
    "trainer.tracking.halving",
    "trainer.tracking.result",
)


def sources(*packages: str, root: Path = ROOT) -> list[Path]:
    return sorted(path for package in packages for path in (root / package).rglob("*.py"))


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the file imports, at any depth, under ``TYPE_CHECKING`` too, by
    statement or by ``import_module("constant")``. ``from a import b`` gives ``a.b``: b may be a module."""
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
    if importer == "trainer":  # the package hands on what `import trainer` gives
        return target == "api"
    if target in (importer, "__version__", "deny_others_writing", "keep_working_folder_out"):
        return True
    if importer not in LEVEL or target not in LEVEL:
        return False
    return LEVEL[target] < LEVEL[importer] or target in NEIGHBOURS.get(importer, ())


def wrong_imports(root: Path = ROOT) -> list[str]:
    """Imports that the table forbids, as ``file:line: importer imports name``."""
    wrong = []
    for path in sources("trainer", "launch", root=root):
        importer = module_name(path, root)
        for line, name in imported(path, root):
            if not _is_allowed(importer, name):
                wrong.append(f"{path.relative_to(root)}:{line}: {importer} imports {name}")
    return wrong


def _is_allowed(importer: str, name: str) -> bool:
    top = name.split(".")[0]
    if importer.split(".")[0] == "launch":
        return top != "trainer" or any(name == m or name.startswith(m + ".") for m in LAUNCH_MAY_IMPORT)
    if top == "launch":
        return room_of(importer) == "cli"
    return top != "trainer" or may_import(room_of(importer), room_of(name))


def circles(root: Path = ROOT) -> list[list[str]]:
    """Groups of modules that import each other in a circle, and of packages that do (a package and one inside it are
    one house, so only separate ones count)."""
    modules = {module_name(path, root): path for path in sources("trainer", "launch", root=root)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = {_module_of(name, modules) for _, name in imported(path, root)}
        graph[module] = {target for target in targets if target and target != module}
    folders: dict[str, set[str]] = {}
    for module, targets in graph.items():
        here = _folder(module, modules)
        for there in (_folder(target, modules) for target in targets):
            if not f"{here}.".startswith(f"{there}.") and not f"{there}.".startswith(f"{here}."):
                folders.setdefault(here, set()).add(there)
    return [*strongly_connected(graph), *strongly_connected(folders)]


def _module_of(name: str, modules: dict[str, Path]) -> str | None:
    """The module that an imported name stands in: ``trainer.errors.AfinaError`` -> ``trainer.errors``."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((c for c in candidates if c in modules), None)


def _folder(module: str, modules: dict[str, Path]) -> str:
    return module if modules[module].name == "__init__.py" else module.rpartition(".")[0]


def strongly_connected(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one node that reach each other (the circles), by repeated search."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += graph.get(node, ())
        reach[start] = seen
    groups = {frozenset({a} | {b for b in reach[a] if a in reach.get(b, ())}) for a in graph if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def floors_as_markdown() -> str:
    """The table as CONTRIBUTING.md shows it, top down."""
    lines = ["```"]
    for number, rooms in enumerate(FLOORS):
        lines.append(f"{len(FLOORS) - number}  {'  '.join(rooms)}")
    return "\n".join([*lines, "```"])
