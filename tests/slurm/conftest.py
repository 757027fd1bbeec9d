"""One Slurm for all tests of this folder."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm_sandbox import Sandbox

# the virtual nodes' names do not resolve
LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "AFINA_PYTHON": sys.executable}


@pytest.fixture(scope="session")
def slurm() -> Iterator[Sandbox]:
    # not below pytest's own folder: munge refuses a socket in a folder that is closed to others
    folder = Path(tempfile.mkdtemp(prefix="afina-slurm-"))
    folder.chmod(0o755)
    try:
        with Sandbox(folder / "sandbox") as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
