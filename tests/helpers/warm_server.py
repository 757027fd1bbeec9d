"""A process that has imported what all of the project's processes import, and forks one of them for each job.

Jobs come on stdin and answers leave on the file descriptor of the first argument, both JSON, one a line. A job is
``{"target", "arguments", "environment" (all of it), "cwd", "output" (a file), "ranks", "file_bytes" (the longest that a
file may be, or null)}``: the target is ``afina``, or the path of a script that is started ``ranks`` times, as torchrun
would. Answers are ``{"pids"}`` and then ``{"code"}``, of the first process that failed, negative for a signal.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

AFINA = "afina"
# The others of a process that has failed may be about to say why they fail too.
OTHERS_SECONDS = 1.0


def load() -> None:
    """Import what the jobs import, and compute nothing: a fork leaves the threads behind. Two are there after these
    imports, one of them jemalloc's; torch's own begin with the first computation."""
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    import wandb.sdk.launch.inputs.internal  # noqa: F401  (each run's start does)

    import trainer.train
    import trainer.training.run

    trainer.train.load_libraries()


def serve(answers: int) -> None:
    own = dict(os.environ)
    load()
    gc.collect()
    gc.freeze()  # forks need not look through what all of them share: DeepSpeed collects often
    by_imports = {name: value for name, value in os.environ.items() if own.get(name) != value}
    for line in sys.stdin:
        job = json.loads(line)
        job["environment"] = by_imports | job["environment"]
        pids = [_fork(answers, job, extra) for extra in _ranks(job["ranks"])]
        _say(answers, pids=pids)
        _say(answers, code=_wait(pids))


def _ranks(count: int | None) -> list[dict[str, str]]:
    """Return what torchrun would add to the environment of each process; of one that is no rank, nothing."""
    if count is None:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _fork(answers: int, job: Mapping[str, Any], extra: Mapping[str, str]) -> int:
    pid = os.fork()
    if not pid:
        os.close(answers)
        _be(job, extra)
    return pid


def _be(job: Mapping[str, Any], extra: Mapping[str, str]) -> NoReturn:
    """Be the process that the job asks for; it ends here."""
    import torch

    from trainer.distributed.process_group import leave

    code = 1
    try:
        os.setsid()
        os.chdir(job["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        file = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if job["file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], resource.RLIM_INFINITY))
        os.environ.clear()
        os.environ.update({**job["environment"], **extra})
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # was read when torch was loaded
        sys.argv = [job["target"], *job["arguments"]]
        if job["target"] == AFINA:
            from trainer.cli import main

            code = main(job["arguments"])
        else:
            runpy.run_path(job["target"], run_name="__main__")
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        if job["ranks"] is not None:  # the other ranks may wait for it, and it for them
            sys.stderr.flush()
            os._exit(code)
    leave(code)


def _wait(pids: list[int]) -> int:
    """Wait for all; what one that failed leaves behind is ended."""
    running, code, end = set(pids), 0, None
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            running.discard(pid)
            if status and not code:
                code, end = os.waitstatus_to_exitcode(status), time.monotonic() + OTHERS_SECONDS
        if end is not None and time.monotonic() > end:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            end = None
        time.sleep(0.01)
    return code


def _say(answers: int, **answer: Any) -> None:
    os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    serve(int(sys.argv[1]))
