"""torchrun, without its traceback where a run was stopped or has said itself why it ends.

``python -m trainer.torchrun`` takes torchrun's own arguments, hands every signal on to the processes, and ends with
their exit code.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from trainer.distributed.rendezvous import (
    QUIET_SECONDS,
    RENDEZVOUS_SECONDS,
    SAY_AGAIN_SECONDS,
    is_loopback,
    network_is_chosen,
    refuse_tasks_a_node,
)
from trainer.errors import INTERRUPTED_EXIT_CODE, LAUNCHER_PIDS, PREEMPTED_EXIT_CODE, AfinaError, LaunchError

# These processes have said what there is to say.
TOLD = frozenset([PREEMPTED_EXIT_CODE, INTERRUPTED_EXIT_CODE, *(e.exit_code for e in AfinaError.__subclasses__())])
# torchrun's own list plus USR1, which Slurm users send as an early warning and which otherwise kills the agent at once
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Be torchrun's agent of this node. Returns the first failing process's exit code, or 128 + a signal's number.

    Args:
        arguments: torchrun's; ``--signals-to-handle`` is ours where it is not given.
    """
    os.environ[LAUNCHER_PIDS] = f"{os.environ.get(LAUNCHER_PIDS, '')},{os.getpid()}"
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import main as torchrun
    from torch.distributed.run import parse_args

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word.replace("_", "-").startswith("--signals-to-handle") for word in words):
        words.insert(0, f"--signals-to-handle={SIGNALS}")
    try:
        refuse_tasks_a_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))  # "2(x4)" on four nodes
        given = parse_args(words)
        _wait_for_master(given)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the agent's: what it says of each signal and end, we say
    if _has_a_master(given):
        threading.Thread(target=_say_who_is_waited_for, args=(given,), name="waiting", daemon=True).start()
    try:
        torchrun(words)
    except (DistStoreError, DistNetworkError, RendezvousError) as error:
        print(f"error: the nodes have not met: {' '.join(str(error).split())}", file=sys.stderr)
        return LaunchError.exit_code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        if first.exitcode not in TOLD:
            print(f"error: {_described(first.exitcode)} rank {first.local_rank} of this node", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _has_a_master(given: Any) -> bool:
    """Return whether several nodes meet at a fixed one."""
    most = given.nnodes.rpartition(":")[2]  # "1:4" is from one to four
    return not given.standalone and given.rdzv_backend == "static" and most != "1"


def _wait_for_master(given: Any) -> None:
    """Wait until node 0 answers, and say so: torchrun itself waits in silence, and ends in a traceback.

    Args:
        given: torchrun's parsed arguments.

    Raises:
        LaunchError: it could never, or has not in time.
    """
    address, port = given.master_addr, given.master_port
    if not _has_a_master(given):
        return
    if is_loopback(address) and not network_is_chosen():
        reason = f"is each node itself: {given.nnodes} nodes would wait for each other"
        hint = "--master-addr HOST of node 0; or GLOO_SOCKET_IFNAME=lo where all is one machine"
        raise LaunchError("--master-addr", value=address, reason=reason, hint=hint)
    if given.node_rank == 0:
        return
    conf = dict(pair.split("=", 1) for pair in given.rdzv_conf.split(",") if "=" in pair)
    seconds = float(conf.get("timeout", RENDEZVOUS_SECONDS))
    begin, said, problem = time.monotonic(), 0.0, ""
    while (passed := time.monotonic() - begin) < seconds:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            problem = error.strerror or str(error)
        if passed - said > (QUIET_SECONDS if said == 0 else SAY_AGAIN_SECONDS):
            said = passed
            print(
                f"node {given.node_rank} waits for node 0 at {address}:{port} ({problem})", file=sys.stderr, flush=True
            )
        time.sleep(1)
    reason = f"node {given.node_rank} could not reach node 0 within {seconds:.0f} s ({problem})"
    hint = "was it started? --master-addr as an address of the network that the nodes share"
    raise LaunchError(f"{address}:{port}", reason=reason, hint=hint)


def _say_who_is_waited_for(given: Any) -> None:
    """Say who is missing while the nodes' agents wait for each other; they start no process before."""
    import psutil

    others = f"the others of {given.nnodes} nodes" if given.node_rank == 0 else "the other nodes"
    time.sleep(QUIET_SECONDS)
    while not psutil.Process().children():
        where = f"{given.master_addr}:{given.master_port}"
        print(f"node {given.node_rank} waits for {others} at {where}", file=sys.stderr, flush=True)
        time.sleep(SAY_AGAIN_SECONDS)


def _described(code: int) -> str:
    return f"signal {-code} has ended" if code < 0 else f"exit code {code} of"


if __name__ == "__main__":
    sys.exit(main())
