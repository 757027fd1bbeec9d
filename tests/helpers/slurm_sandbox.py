"""A real Slurm on one machine: munged, slurmctld and one slurmd a virtual node, as the calling user, in a folder.

Not there: cgroups, accounting, memory limits. The nodes' names do not resolve, so jobs need MASTER_ADDR=127.0.0.1.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

_CONF = """\
ClusterName=sandbox
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> list[str]:
    """Programs of Slurm that are not installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


class Sandbox:
    """Slurm daemons under ``folder``; `with Sandbox(folder) as slurm:` starts and stops them.

    Args:
        folder: a new folder; it and its parents must be open to all (munge refuses a socket below a 0700 folder).
        nodes: virtual nodes, each with two cores and two pretended GPUs.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder.resolve()
        self.nodes = nodes
        self.environment = {
            **os.environ,
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin",
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> Sandbox:
        self._write_files()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def _write_files(self) -> None:
        folder = self.folder
        folder.mkdir(mode=0o755)
        (folder / "state").mkdir()
        for device in ("gpu0", "gpu1"):  # a gres wants a file; without cgroups any file does
            (folder / device).touch()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = _free_ports(1 + self.nodes)
        user = subprocess.check_output(["id", "-un"], text=True).strip()
        lines = [_CONF.format(folder=folder, user=user, ports=ports)]
        for number, port in enumerate(ports[1:], 1):
            (folder / f"spool.node{number}").mkdir()
            where = f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}"
            lines.append(f"NodeName=node{number} {where} CPUs=2 RealMemory=8000 Gres=gpu:2\n")
        lines.append("PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=20\n")
        lines.append("PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF\n")
        (folder / "slurm.conf").write_text("".join(lines))
        (folder / "gres.conf").write_text(f"NodeName=node[1-{self.nodes}] Name=gpu File={folder}/gpu[0-1]\n")

    def _start(self) -> None:
        kinds = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", *(f"--{option}={self.folder}/munge.{ending}" for option, ending in kinds.items()))
        self.call("slurmctld")
        for number in range(1, self.nodes + 1):
            self.call("slurmd", "-N", f"node{number}")
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with suppress(subprocess.CalledProcessError):
                if self.call("sinfo", "-h", "-t", "idle", "-o", "%D") == str(self.nodes):
                    return
            time.sleep(0.2)
        logs = "\n".join(log.read_text()[-1500:] for log in sorted(self.folder.glob("*.log")))
        raise RuntimeError(f"Slurm did not come up:\n{logs}")

    def stop(self) -> None:
        """End all jobs, then the daemons, each by its own pid file."""
        with suppress(subprocess.CalledProcessError, OSError):
            self.call("scancel", "--state=PENDING,RUNNING,SUSPENDED", "-u", str(os.getuid()))
        time.sleep(1)
        for pattern in ("slurmd.*.pid", "slurmctld.pid", "munge.pid"):
            for file in self.folder.glob(pattern):
                with suppress(OSError, ValueError):
                    os.kill(int(file.read_text()), signal.SIGTERM)

    def call(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """Run a Slurm program and return its output, stripped.

        Raises:
            subprocess.CalledProcessError: it failed; its stderr is in the error.
        """
        # from a file, since a daemon that inherits a pipe keeps the reader waiting for ever
        with (self.folder / "call.err").open("w+") as errors, (self.folder / "call.out").open("w+") as output:
            variables = {**self.environment, **(environment or {})}
            code = subprocess.run(command, cwd=cwd, env=variables, stdout=output, stderr=errors, check=False).returncode
            output.seek(0)
            errors.seek(0)
            if code:
                raise subprocess.CalledProcessError(code, command, output.read(), errors.read())
            return output.read().strip()

    def fields(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says: JobState, ExitCode, Restarts, …"""
        shown = self.call("scontrol", "-o", "show", "job", job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait(self, job: str, timeout_seconds: float) -> dict[str, str]:
        """Wait for a job's end and return its :meth:`fields`. What Slurm holds back after a requeue, two minutes, is
        let go: at once, a start dies with "Job credential revoked"."""
        end = time.monotonic() + timeout_seconds
        while True:
            fields = self.fields(job)
            if fields["JobState"] in FINAL_STATES:
                return fields
            if (fields["JobState"], fields["Reason"]) == ("PENDING", "BeginTime"):
                time.sleep(3)
                with suppress(subprocess.CalledProcessError):
                    self.call("scontrol", "update", f"jobid={job}", "StartTime=now")
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {fields['JobState']} after {timeout_seconds} s")
            time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def main() -> None:
    """`python -m tests.helpers.slurm_sandbox start|stop FOLDER`: prints the slurm.conf to export as SLURM_CONF."""
    what, folder = sys.argv[1:]
    sandbox = Sandbox(Path(folder))
    if what == "stop":
        sandbox.stop()
    else:
        sandbox.__enter__()
        print(sandbox.environment["SLURM_CONF"])


if __name__ == "__main__":
    main()
