"""`afina doctor`: each check finds what is wrong, says its cure, and the exit code follows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

import trainer.cli.app
from launch.doctor import allocation, machine, packages, ranks
from launch.doctor.check import check_all
from launch.doctor.finding import FAILED, OK, WARNING, Finding, has_failed
from tests.helpers.processes import ROOT
from trainer.config import TrainConfig, load

ALLOCATION = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "4",
}


def config(*overrides: str) -> TrainConfig:
    return load(list(overrides), with_data=False)


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SLURM_") or name in ("MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.delenv(name)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def test_versions_are_held_against_the_projects_own_bounds() -> None:
    asked = packages.required()
    assert set(packages.DECIDING) <= set(asked)
    assert {finding.state for finding in packages.check_versions()} == {OK}
    wrong = {"torch": Requirement("torch>=99"), "peft": Requirement("peft<0.1")}
    torch_, peft = packages.check_versions(wrong)
    assert (torch_.state, peft.state) == (FAILED, FAILED)
    assert torch.__version__ in torch_.found
    assert "outside >=99" in torch_.found
    assert "pip install" in peft.cure


def test_a_library_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "DECIDING", ("not-there-at-all",))
    (finding,) = packages.check_versions({"not-there-at-all": Requirement("not-there-at-all>=2")})
    assert (finding.state, finding.found) == (FAILED, "not installed; >=2 is needed")


def test_bounds_of_an_installed_wheel_are_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a checkout's pyproject.toml the installed distribution says them; extras are not asked for."""
    info = tmp_path / "afina-9.dist-info"
    info.mkdir()
    lines = ["Name: afina", "Version: 9", "Requires-Dist: torch>=77", "Requires-Dist: ruff; extra == 'dev'"]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]))
    monkeypatch.setattr(packages.trainer.config, "conf_dir", lambda: tmp_path / "trainer" / "conf")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert {name: str(each.specifier) for name, each in packages.required().items()} == {"torch": ">=77"}


def test_a_foreign_trainer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ROOT / "trainer"
    assert packages.check_origin(ours, [str(ROOT)]).state == OK
    (tmp_path / "trainer").mkdir()
    assert packages.check_origin(ours, [str(tmp_path), str(ROOT)]).state == OK  # no package: Python passes it over
    (tmp_path / "trainer" / "__init__.py").write_text("")
    later = packages.check_origin(ours, [str(ROOT), str(tmp_path)])
    assert (later.state, str(tmp_path / "trainer") in later.found) == (WARNING, True)
    assert packages.check_origin(tmp_path / "trainer", [str(tmp_path)]).state == FAILED
    monkeypatch.chdir(tmp_path)
    here = packages.check_origin(ours, ["", str(ROOT)])
    assert (here.state, "PYTHONSAFEPATH=1" in here.cure) == (WARNING, True)
    assert "torchrun by hand takes" in here.found


def test_an_installed_package_of_that_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyPI's: installed into the folder of ours, it is found by what is recorded, not by where it lies."""
    info = tmp_path / "trainer-0.0.36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trainer\nVersion: 0.0.36\n")
    (info / "top_level.txt").write_text("trainer\n")
    (info / "RECORD").write_text("trainer/__init__.py,,\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    finding = packages.check_origin(ROOT / "trainer", [str(ROOT)])
    assert (finding.state, "the package trainer" in finding.found) == (WARNING, True)
    assert finding.cure.startswith("pip uninstall trainer")


def test_a_torch_without_the_gpus_of_the_driver_fails() -> None:
    seen = torch.cuda.device_count()
    found = machine.describe_machine(config(), seen + 2, 1)
    assert states(found)["GPUs"] == FAILED
    assert f"sees {seen} of the {seen + 2} GPUs" in found[0].found
    assert not has_failed(machine.describe_machine(config(), seen, 1))


def test_little_memory_and_few_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_cores(1).state == OK
    assert machine.check_cores(10**6).state == WARNING
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(machine, "memory_limit", lambda: (2**62, 2**62))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(64 * 2**30, 12 * 2**30))
    assert machine.check_memory(6).state == OK
    assert machine.check_memory(8).state == WARNING
    monkeypatch.setattr(machine, "memory_limit", lambda: (8 * 2**30, 3 * 2**30))
    assert machine.check_memory(2).found.startswith("3.0 of 8 GiB free")
    assert machine.check_memory(2).state == WARNING


def test_the_limit_of_a_job_counts(tmp_path: Path) -> None:
    """The tightest one above this process; file pages that can be dropped are free."""
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_12\n")
    for folder, limit, held in (("slurm", "max", 0), ("slurm/job_12", "1000", 700)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{held}\n")
        (tmp_path / folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert machine.memory_limit(tmp_path, own) == (1000, 500)
    own.write_text("0::/slurm\n")
    assert machine.memory_limit(tmp_path, own)[0] > 2**60


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    finding = machine.check_disk("disk", tmp_path / "not" / "yet", "run.dir")
    assert finding.state in (OK, WARNING)  # a slow or nearly full disk is this machine's
    assert "MB/s" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    for free, state in ((0, FAILED), (2**30, WARNING)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(2**40, 2**40 - free, free))
        finding = machine.check_disk("disk", tmp_path, "run.dir")
        assert finding.state == state
        assert "run.dir=" in finding.cure


def test_a_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = machine.check_disk("disk", tmp_path / "file" / "runs", "AFINA_CACHE")
    assert (finding.state, "cannot be written" in finding.found) == (FAILED, True)
    assert finding.cure.startswith("AFINA_CACHE=")


def test_a_slow_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**50, 0, 2**50))
    finding = machine.check_disk("disk", tmp_path, "run.dir")
    assert (finding.state, "faster disk" in finding.cure) == (WARNING, True)


def test_a_cache_that_everybody_can_write_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert machine.check_cache_owner(tmp_path).state == OK
    assert machine.check_cache_owner(tmp_path / "new").state == OK
    tmp_path.chmod(0o777)
    finding = machine.check_cache_owner(tmp_path)
    assert (finding.state, finding.cure) == (WARNING, f"chmod o-w {tmp_path}")


def test_a_port_that_is_taken_is_told(taken_port: int) -> None:
    assert machine.check_port(0, 1, "another").state == OK
    assert machine.check_port(taken_port, 1, "another").state == WARNING  # `afina train` takes a free one
    several = machine.check_port(taken_port, 2, "another")
    assert (several.state, str(taken_port) in several.found, several.cure) == (FAILED, True, "another")


def test_a_name_that_does_not_resolve_is_told() -> None:
    assert machine.check_name(1, "nowhere.invalid").state == WARNING
    several = machine.check_name(2, "nowhere.invalid")
    assert (several.state, several.found) == (FAILED, "nowhere.invalid does not resolve")
    assert machine.check_name(1, "localhost").state == OK
    loop = machine.check_name(2, "localhost")
    assert (loop.state, "127.0.0.1" in loop.found) == (WARNING, True)


def test_a_master_that_does_not_lead_to_node_0_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = ["launch=torchrun", "launch.nodes=2"]
    assert machine.check_master(config(*nodes, "launch.master_address=192.0.2.7")).state == OK
    assert machine.check_master(config(*nodes, "launch.master_address=nowhere.invalid")).state == FAILED
    names = {"node0": "127.0.1.1"}
    monkeypatch.setattr(machine.socket, "getaddrinfo", lambda name, *_, **__: [(0, 0, 0, "", (names[name], 0))])
    node0, node1 = (config(*nodes, "launch.master_address=node0", f"launch.node_rank={rank}") for rank in (0, 1))
    assert machine.check_master(node0).state == OK  # its own name, on itself
    assert machine.check_master(node1).state == FAILED
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert machine.check_master(node1).state == OK


def test_slurm_that_is_asked_for_and_not_there_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert states(allocation.check_slurm(config())) == {"Slurm": OK}
    assert states(allocation.check_slurm(config("launch=slurm"))) == {"Slurm": FAILED}


@pytest.mark.parametrize(
    ("environment", "overrides", "check", "state"),
    [
        ({}, ["launch.nodes=2", "launch.gpus_per_node=4"], "", OK),
        ({}, ["launch.nodes=4"], "nodes of the job", FAILED),
        ({"SLURM_JOB_NUM_NODES": "8"}, ["launch.nodes=2"], "nodes of the job", WARNING),
        ({}, ["launch.gpus_per_node=8"], "GPUs of the job", FAILED),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_JOB_GPUS": "0,1"}, ["launch.gpus_per_node=4"], "GPUs of the job", FAILED),
        ({"SLURM_NTASKS_PER_NODE": "4"}, [], "tasks a node", FAILED),
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, [], "tasks a node", WARNING),
        ({"SLURM_TASKS_PER_NODE": "2,1(x3)"}, [], "tasks a node", WARNING),
        ({}, ["launch.cpus_per_node=4096"], "cores of the job", WARNING),
    ],
)
def test_an_allocation_is_held_against_what_is_asked(
    environment: dict[str, str], overrides: list[str], check: str, state: str
) -> None:
    found = states(allocation.check_slurm(config("launch=slurm", *overrides), {**ALLOCATION, **environment}))
    assert {name: found[name] for name in found if found[name] != OK} == ({check: state} if check else {})


def test_in_an_allocation_its_own_port_is_tried(taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ALLOCATION, "MASTER_PORT": str(taken_port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "describe_machine", lambda *_: [])
    assert states(check_all(config()))["port"] == FAILED


def test_several_nodes_get_the_line_for_all_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in ALLOCATION.items():
        monkeypatch.setenv(name, value)
    assert ranks.measure_ranks(config("launch.rendezvous_seconds=30"), 4) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("srun --ntasks-per-node=1 bash -c '")
    assert "-m trainer.preflight --seconds=30" in line
    assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["launch=slurm"], 4), (["launc.nodes=2"], 2)])
def test_the_exit_code_says_whether_a_job_would_run(
    arguments: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm, no GPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    assert trainer.cli.app.main(["doctor", *arguments]) == code
    shown = capsys.readouterr().out
    assert ("host memory" in shown) == (code != 2)
    assert ("failed" in shown) == (code == 4)
    assert list(tmp_path.iterdir()) == []
