"""A built wheel carries everything that a run needs, and works where there is no checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.processes import ROOT, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout with the tools of this environment: nothing is fetched."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], cwd=out)
    (built,) = out.glob("afina-*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("folder", "inside"),
    [
        ("trainer", "trainer"),
        ("launch", "launch"),
        ("conf", "trainer/conf"),
        ("slurm", "trainer/slurm"),
        ("examples/headlines", "trainer/examples/headlines"),
        ("examples/medical", "trainer/examples/medical"),
    ],
)
def test_wheel_carries_all_of(folder: str, inside: str, names: set[str]) -> None:
    files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".pyc"]
    assert files, f"{folder}/ is empty"
    assert {f"{inside}/{path.as_posix()}" for path in files} <= names


def test_wheel_carries_nothing_else(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trainer", "launch"}


def test_packages_are_regular(names: set[str]) -> None:
    """Without ``__init__.py`` a folder of the same name elsewhere on sys.path would be merged into ours."""
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".py")}
    assert [folder for folder in sorted(folders) if f"{folder}/__init__.py" not in names] == []


def test_script_is_declared(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "afina = trainer.cli:main" in archive.read(entry).decode()


def test_wheel_loads_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say yes.", "output": "yes"}\n')
    code = (
        "import trainer.config\n"
        "config = trainer.config.load(['data.path=rows.jsonl', 'method.r=4'])\n"
        "print(trainer.config.__file__, config.method.r, sep='\\n')\n"
    )
    output = run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(unpacked)}).output
    where, rank = output.split()[-2:]
    assert Path(where).is_relative_to(unpacked)
    assert rank == "4"


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(dep for extra in project["optional-dependencies"].values() for dep in extra)]
    pins = constraints()
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{requirement} against {pins[name]}"


def test_pins_fit_every_machine() -> None:
    """No local labels (``+cpu``), no paths: each machine's own index decides between CPU and CUDA builds."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_environment_is_consistent() -> None:
    answer = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout


def test_the_lock_file_is_what_constraints_and_project_ask_for() -> None:
    """After a change of either: ``make lock``. torch is not in it: each index has its own builds."""
    locked = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text()):
        if entry.startswith("#"):
            continue
        requirement = Requirement(entry.partition(" \\\n")[0])
        locked[canonicalize_name(requirement.name)] = requirement
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"{requirement} has no hash"
    for name, pinned in constraints().items():
        if name in locked:
            assert str(locked[name].specifier) == f"=={pinned}", name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])}
    assert {canonicalize_name(each.name) for each in wanted} - set(locked) == {"torch"}
    assert [name for name in locked if name.startswith(("nvidia-", "cuda-", "triton"))] == []


def constraints() -> dict[str, str]:
    """Canonical package name -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}
