"""Write `environment.json`: what a run ran on, so that its numbers can be placed a year later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.files import write_atomically
from trainer.redaction import is_secret_name, redact
from trainer.tracking.files import strict

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "afina",
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
    "wandb",
)


def write_environment(folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write `environment.json` atomically: packages, Python, commit, host, launch command, and ``extra``.

    Args:
        folder: the run folder.
        extra: what only the caller knows and that needs torch or the process group: ``devices``, ``hosts``,
            ``world_size``; merged last.
    """
    content = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [_redact_argument(argument) for argument in [sys.executable, *sys.argv]],
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hosts": [socket.gethostname()],
        "cpu_count": os.cpu_count(),
        "git": _git(Path.cwd()),
        "packages": _package_versions(),
        "variables": {name: redact(value) for name, value in sorted(os.environ.items()) if _is_recorded(name)},
        **(extra or {}),
    }
    text = json.dumps(strict(content), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(folder) / ENVIRONMENT_FILE, text.encode() + b"\n")


def _redact_argument(argument: str) -> str:
    """Redact an argument; of ``key=value`` all of the value, where the key says so."""
    key, separator, value = argument.partition("=")
    return f"{key}={redact(value, key)}" if separator and is_secret_name(key) else redact(argument)


def _package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit of ``folder`` and whether files differ from it; None outside a repository or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "HEAD")
        return {"commit": commit, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _is_recorded(name: str) -> bool:
    """Return whether a variable changes speed or placement, and cannot hold a user's private matters."""
    exact = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    prefixes = ("NCCL_", "TORCHELASTIC_", "PYTORCH_", "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_RESTART_COUNT")
    return (name in exact or name.startswith(prefixes)) and not is_secret_name(name)
