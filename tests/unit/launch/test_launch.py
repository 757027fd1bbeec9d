"""Starting a job: the command, the environment, signals, and the exit code that the run folder decides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import environment, process, torchrun
from tests.helpers.processes import ROOT, stop_tree
from trainer.config import load, run_folder, run_name
from trainer.errors import LaunchError
from trainer.tracking.files import find_summary

CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
def end(status, code, **more):
    (folder / "new.json").write_text(json.dumps({"status": status, **more}))
    os.replace(folder / "new.json", folder / "summary.json")
    sys.exit(code)
"""


def child(tmp_path: Path, body: str) -> list[str]:
    return [sys.executable, "-c", CHILD + body, str(tmp_path / "run")]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("end('finished', 0)", 0),
        ("end('finished', 1)", 0),  # as torchrun's after a clean end of a run that was also signalled
        ("end('failed', 1, error={'kind': 'data', 'message': 'row 3', 'rank': 0})", 2),
        ("end('failed', 1, error={'kind': 'training', 'message': 'nan', 'rank': 1})", 5),
        ("end('failed', 7, error={'kind': 'unheard of', 'message': '', 'rank': 0})", 7),
        ("end('preempted', 1)", 75),
        ("sys.exit(0)", 0),
        ("sys.exit(2)", 2),
    ],
)
def test_the_summary_decides_the_exit_code(tmp_path: Path, body: str, code: int) -> None:
    assert process.run(child(tmp_path, body), dict(os.environ), tmp_path / "run") == code


def test_a_summary_of_an_earlier_job_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"status": "finished"}))
    assert process.run(child(tmp_path, "sys.exit(2)"), dict(os.environ), folder) == 2
    assert process.run(child(tmp_path, "sys.exit(0)"), dict(os.environ), folder) == 0


def test_a_killed_child_is_a_launch_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="SIGKILL"):
        process.run(child(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"), dict(os.environ), tmp_path / "run")


def test_a_program_that_is_not_there_is_a_launch_error(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot start"):
        process.run([str(tmp_path / "no-python")], dict(os.environ), tmp_path)


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, "SIGTERM"),  # Ctrl-C asks to save, as the scheduler does
        (signal.SIGUSR1, "SIGUSR1"),
    ],
)
def test_signals_are_passed_on_once(tmp_path: Path, sent: signal.Signals, got: str) -> None:
    body = """
seen = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
(folder / "ready").touch()
while not seen: time.sleep(0.01)
time.sleep(0.5)
end("preempted", 1, seen=seen)
"""
    folder = tmp_path / "run"
    parent = f"""
import os, sys
from pathlib import Path
from launch import process
sys.exit(process.run({child(tmp_path, body)!r}, dict(os.environ), Path({str(folder)!r})))
"""
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(folder / "ready")
    started.send_signal(sent)
    time.sleep(0.2)
    if sent != signal.SIGINT:
        started.send_signal(sent)  # a scheduler may well send it twice
    assert started.wait(20) == 75
    assert find_summary(folder)["seen"] == [got]


def test_a_second_ctrl_c_kills_the_child_and_its_workers(tmp_path: Path) -> None:
    body = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
(folder / "pid.new").write_text(str(worker.pid)); os.replace(folder / "pid.new", folder / "pid")
time.sleep(60)
"""
    folder = tmp_path / "run"
    parent = f"""
import os, sys
from pathlib import Path
from launch import process
sys.exit(process.run({child(tmp_path, body)!r}, dict(os.environ), Path({str(folder)!r})))
"""
    started = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(folder / "pid")
    started.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert started.wait(20) == 130
    worker = Path("/proc") / (folder / "pid").read_text() / "stat"
    end = time.monotonic() + 10
    # killed: gone, or a zombie where this machine's first process does not collect orphans
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"


def wait_for(file: Path, timeout_seconds: float = 20, holds: str = "") -> None:
    end = time.monotonic() + timeout_seconds
    while not file.exists() or holds not in file.read_text():
        assert time.monotonic() < end, f"{file} never came"
        time.sleep(0.02)


def test_one_node_takes_a_free_port_and_fixes_the_name() -> None:
    overrides = ["debug=tiny", "launch=torchrun", "launch.nproc_per_node=2"]
    config = load(overrides)
    command = torchrun.command(config, overrides)
    assert command[:3] == [sys.executable, "-m", "trainer.torchrun"]
    assert {"--nnodes=1", "--nproc-per-node=2", "--standalone"} <= set(command)
    inner = command[command.index("trainer.train") + 1 :]
    assert inner == [*overrides, f"run.name={run_name(config)}"]
    # the workers come to the same folder by what they are told
    assert run_folder(load(inner)) == run_folder(config)


def test_many_nodes_meet_at_the_address_given() -> None:
    overrides = ["debug=tiny", "launch=torchrun", "launch.nodes=3", "launch.node_rank=2", "launch.nproc_per_node=1"]
    overrides += ["launch.master_address=10.0.0.7", "launch.master_port=4000", "run.name=mine"]
    command = torchrun.command(load(overrides), overrides)
    wanted = {"--nnodes=3", "--node-rank=2", "--master-addr=10.0.0.7", "--master-port=4000", "--rdzv-backend=static"}
    assert wanted <= set(command)
    assert "--standalone" not in command
    assert command[-1] == "run.name=mine"


def test_torchrun_knows_every_option() -> None:
    run = pytest.importorskip("torch.distributed.run")
    overrides = ["debug=tiny", "launch=torchrun", "launch.nproc_per_node=2"]
    for more in ([], ["launch.nodes=2", "launch.node_rank=1", "launch.master_address=node0"]):
        command = torchrun.command(load([*overrides, *more]), [*overrides, *more])
        parsed = run.parse_args(command[3:])
        assert parsed.module
        assert parsed.training_script == "trainer.train"
        assert parsed.nproc_per_node == "2"


@pytest.mark.parametrize(
    "value",
    ["runs", "/a/b.c-d", "null", "true", "1e3", "007", "with space", "q\"uo'te", "a,b", "ü", "a\\b", "a\\", 'a\\"'],
)
def test_quoted_values_come_back_as_they_are(value: str) -> None:
    assert load(["debug=tiny", f"log.group={torchrun.quote(value)}"]).log.group == value


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.defaults(1, 0, "127.0.0.1"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    made = environment.child_environment(2, 0)
    assert made["OMP_NUM_THREADS"] == "3"
    assert made["GLOO_SOCKET_IFNAME"] == "eth7"
    assert made["TOKENIZERS_PARALLELISM"] == "false"
    assert made["PATH"] == os.environ["PATH"]


def test_defaults_follow_the_devices() -> None:
    cpu, gpu = environment.defaults(1, 0, "127.0.0.1"), environment.defaults(1, 1, "127.0.0.1")
    assert not [name for name in cpu if "NCCL" in name]
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" in gpu
    assert cpu.get("GLOO_SOCKET_IFNAME") == ("lo" if Path("/sys/class/net/lo").exists() else None)
    # loopback would cut a node off from the others
    assert "GLOO_SOCKET_IFNAME" not in environment.defaults(1, 0, "10.0.0.7")
    assert cpu["OMP_NUM_THREADS"] == str(environment.cores())
    assert environment.defaults(10_000, 0, "127.0.0.1")["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("value", "count"), [("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("2, 5", 2), ("0,-1,1", 1), ("MIG-a/1/2,GPU-b", 2)]
)
def test_visible_devices_decide(value: str, count: int) -> None:
    assert environment.visible_gpus({"CUDA_VISIBLE_DEVICES": value}) == count


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.visible_gpus({}) == 0
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho 'GPU 0: A100 (UUID: GPU-1)'\necho '  MIG 1g.5gb Device 0: (UUID: MIG-2)'\necho 'GPU 1: A100'\n"
    )
    smi.chmod(0o755)
    assert environment.visible_gpus({}) == 2
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert environment.visible_gpus({}) == 0


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_the_run_on_all_ranks(tmp_path: Path, tiny_model: Path) -> None:
    """The whole way: launcher, torchrun's agent, two ranks. Torchrun itself would end with a traceback and code 1."""
    overrides = ["debug=tiny", "launch=torchrun", "launch.nproc_per_node=2", f"run.dir={tmp_path}", "run.name=run"]
    overrides += ["batch.epochs=1000", "batch.max_steps=5000", "eval.before=false", "eval.metrics=[loss]", "log=off"]
    command = [sys.executable, "-m", "trainer.cli.app", "train", *overrides]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(tmp_path / "run" / "metrics.jsonl", timeout_seconds=120, holds='"step": 1')
            started.send_signal(signal.SIGTERM)
            code = started.wait(60)
        finally:
            stop_tree(started)
    said = (tmp_path / "log").read_text()
    assert code == process.PREEMPTED, said
    assert "Traceback" not in said
    assert find_summary(tmp_path / "run")["status"] == "preempted"
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/COMPLETE"))
