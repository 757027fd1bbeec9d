"""torchrun, without its traceback where a run was stopped or has said itself why it ends.

``python -m trainer.torchrun`` takes torchrun's own arguments, hands every signal on to the processes, and ends with
their exit code.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from trainer.errors import INTERRUPTED_EXIT_CODE, LAUNCHER_PIDS, PREEMPTED_EXIT_CODE, AfinaError

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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    words = list(sys.argv[1:] if arguments is None else arguments)
    if not any(word.replace("_", "-").startswith("--signals-to-handle") for word in words):
        words.insert(0, f"--signals-to-handle={SIGNALS}")
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.ERROR)  # the agent's: it warns of each signal that it hands on
    try:
        torchrun(words)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        if first.exitcode not in TOLD:
            print(f"error: {_described(first.exitcode)} rank {first.local_rank} of this node", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0


def _described(code: int) -> str:
    return f"signal {-code} has ended" if code < 0 else f"exit code {code} of"


if __name__ == "__main__":
    sys.exit(main())
