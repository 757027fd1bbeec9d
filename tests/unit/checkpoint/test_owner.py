"""One owner a run: of many that start at once one goes on; a killed owner frees it; another host's is respected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT
from trainer.checkpoint.owner import PATIENCE_SECONDS, own_run, show_owner
from trainer.errors import ConfigError, LaunchError
from trainer.files import OWNER_FILE, SILENT_SECONDS, find_owner, lock, run_lock_path, try_lock

HOLD = """
import sys, time
from pathlib import Path
from trainer.checkpoint.owner import own_run, show_owner
from trainer.errors import ConfigError, LaunchError
folder = Path(sys.argv[1])
try:
    with own_run(folder), show_owner(folder):
        print("owns", flush=True)
        time.sleep(float(sys.argv[2]))
except LaunchError as error:
    print(error, flush=True)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_second_comer_hears_who_owns_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    owner = start(folder, 60)
    try:
        assert first_line(owner) == "owns"
        with (
            pytest.raises(LaunchError, match=rf"is being trained by process {owner.pid} on ") as caught,
            own_run(folder),
        ):
            pass
        assert caught.value.exit_code == 4
        found = find_owner(folder)
        assert found is not None
        assert found.startswith(f"process {owner.pid} on ")
    finally:
        owner.kill()
        owner.wait()
    assert find_owner(folder) is None
    with own_run(folder):  # the kernel has freed it
        pass
    assert (folder / OWNER_FILE).exists(), "a killed owner leaves its name"


def test_of_ten_at_once_one_owns_it(tmp_path: Path) -> None:
    processes = [start(tmp_path / "one", 3) for _ in range(10)]
    said = [first_line(process) for process in processes]
    for process in processes:
        process.wait()
    assert said.count("owns") == 1
    assert all("is being trained by" in line for line in said if line != "owns")


def test_an_owner_that_leaves_takes_its_name_along(tmp_path: Path) -> None:
    with own_run(tmp_path / "one"), show_owner(tmp_path / "one"):
        owner = json.loads((tmp_path / "one" / OWNER_FILE).read_text())
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / "one" / OWNER_FILE).exists()


@pytest.mark.parametrize(("silent_seconds", "is_free"), [(0, False), (SILENT_SECONDS + 5, True)])
def test_an_owner_on_another_host_counts_while_it_lives(tmp_path: Path, silent_seconds: int, is_free: bool) -> None:
    """A filesystem may keep locks to one host."""
    folder = tmp_path / "one"
    folder.mkdir()
    file = folder / OWNER_FILE
    file.write_text(json.dumps({"host": "node-7", "pid": 12, "job": "345", "since": "yesterday"}))
    long_ago = time.time() - silent_seconds
    os.utime(file, (long_ago, long_ago))
    assert (find_owner(folder) is None) == is_free
    if is_free:
        with own_run(folder):
            return
    with pytest.raises(LaunchError, match="process 12 on node-7, job 345, since yesterday"), own_run(folder):
        pass


def test_who_only_looks_is_not_taken_for_an_owner(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    assert find_owner(folder) is None
    assert not run_lock_path(folder).exists(), "looking leaves nothing behind"
    with ExitStack() as looking:
        looking.enter_context(try_lock(run_lock_path(folder)))
        threading.Timer(PATIENCE_SECONDS / 3, looking.close).start()
        with own_run(folder):
            assert find_owner(folder) == "another process, which has just begun"


@pytest.mark.parametrize(("file", "folder", "said"), [("runs", "runs/a", "run.dir"), ("runs/a", "runs/a", "run.name")])
def test_a_file_where_the_folder_should_be_is_said(tmp_path: Path, file: str, folder: str, said: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(ConfigError, match=f"^{said}=.* is a file → another {said}$"), own_run(tmp_path / folder):
        pass
    assert (tmp_path / file).read_text() == "mine"


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    run_lock_path(tmp_path / "run").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="is a link"), own_run(tmp_path / "run"):
        pass
    with pytest.raises(OSError, match="symbolic links"), lock(run_lock_path(tmp_path / "run")):
        pass
    assert (tmp_path / "precious").read_text() == "mine"
