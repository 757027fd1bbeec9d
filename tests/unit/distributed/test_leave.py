"""The end of a process whose gloo threads are still busy."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# A gloo thread that wants the interpreter back while it is being taken down: what happens by chance, made certain.
SCRIPT = """
import atexit, time
import torch, torch.distributed as dist
from trainer.distributed import process_group as distributed

class SlowToGo:
    def __del__(self, sleep=time.sleep):
        sleep(1.5)

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
held = dist.group.WORLD  # as DeepSpeed's modules hold it
dist.all_reduce(torch.ones(1), async_op=True).get_future().then(lambda _: time.sleep(0.7))
distributed.shutdown()
slow = SlowToGo()
atexit.register(print, "handlers run")
print("work done")
distributed.leave(75)
"""


@pytest.mark.slow
def test_a_busy_gloo_thread_does_not_abort_a_process_whose_work_is_done() -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-c", SCRIPT]
    left = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert left.returncode == 75, left.stderr
    assert left.stdout.splitlines() == ["work done", "handlers run"]
