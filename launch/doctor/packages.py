"""Check the installation: versions against the project's bounds, and whose `trainer` Python finds."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from packaging.requirements import Requirement

import trainer.config
from launch.doctor.finding import FAILED, OK, WARNING, Finding

PROJECT = "afina"
DECIDING = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
_HOME = Path(__file__).resolve().parents[2]


def required() -> dict[str, Requirement]:
    """Return what the project asks of its libraries, by name: of the checkout, or of the installed wheel."""
    checkout = trainer.config.conf_dir().parent / "pyproject.toml"
    if checkout.is_file():
        lines = tomllib.loads(checkout.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires(PROJECT) or []
    found = [Requirement(line) for line in lines if "extra ==" not in line]
    return {each.name: each for each in found if each.marker is None or each.marker.evaluate()}


def check_versions(asked: Mapping[str, Requirement] | None = None) -> list[Finding]:
    """Compare the installed versions of the libraries that decide whether training runs with the project's bounds.

    Args:
        asked: requirements by name; ``None``: the project's own.
    """
    asked = required() if asked is None else asked
    return [_check_version(asked[name]) for name in DECIDING if name in asked]


def _check_version(asked: Requirement) -> Finding:
    cure = f"pip install -c constraints.txt '{asked.name}{asked.specifier}'"
    try:
        version = importlib.metadata.version(asked.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(asked.name, FAILED, f"not installed; {asked.specifier} is needed", cure)
    if not asked.specifier.contains(version, prereleases=True):
        return Finding(asked.name, FAILED, f"{version}, outside {asked.specifier}", cure)
    return Finding(asked.name, OK, version)


def check_origin(imported: Path | None = None, folders: Sequence[str] | None = None) -> Finding:
    """Say where `trainer` is imported from, and whether another package of that name can come in its place.

    PyPI has one; what was installed last into one folder wins, and so does what stands first on the path, where
    torchrun started by hand puts the working folder.

    Args:
        imported: the package's folder as this process has it.
        folders: in the order in which Python looks; ``None``: the working folder and ``sys.path``.
    """
    ours = _HOME / "trainer"
    here = Path(trainer.__file__).parent if imported is None else imported
    folders = ["", *sys.path] if folders is None else folders
    if here.resolve() != ours:
        return Finding("package trainer", FAILED, f"{here}, which is not this project's ({ours})", _uninstall())
    others = [name for name in importlib.metadata.packages_distributions().get("trainer", []) if name != PROJECT]
    found = list(dict.fromkeys(place for folder in folders if (place := _trainer_in(folder)) is not None))
    foreign = [place for place in found if place != ours]
    if foreign and foreign[0].parent == Path.cwd():
        cure = "start jobs from another folder, or export PYTHONSAFEPATH=1"
        return Finding("package trainer", WARNING, f"{here}; torchrun by hand takes {foreign[0]} first", cure)
    if foreign or others:
        also = ", ".join([*map(str, foreign), *(f"the package {name}" for name in sorted(set(others)))])
        cure = _uninstall(others) if others else "take that folder off the path: PYTHONPATH, or an old editable install"
        return Finding("package trainer", WARNING, f"{here}; also there: {also}", cure)
    return Finding("package trainer", OK, str(here))


def _trainer_in(folder: str) -> Path | None:
    """Return what `import trainer` would take from a folder: a package's folder, or a module's file."""
    spec = PathFinder.find_spec("trainer", [folder or str(Path.cwd())])
    if spec is None or spec.origin is None:  # a folder without __init__.py gives way to any package
        return None
    origin = Path(spec.origin).resolve()
    return origin.parent if origin.name == "__init__.py" else origin


def _uninstall(others: Sequence[str] = ("trainer",)) -> str:
    return f"pip uninstall {' '.join(sorted(set(others)) or ['trainer'])}, then install {PROJECT} again"
