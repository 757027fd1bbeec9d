"""One rank of a training that kills itself at a given point, as ``kill -9`` would.

AFINA_CHAOS=POINT:STEP:RANKS python benchmarks/_chaos_rank.py [overrides]      (RANKS: 0, 1 or 0,1)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

POINT, STEP, RANKS = os.environ.get("AFINA_CHAOS", "none:0:").split(":")


def die() -> None:
    """End this process as it stands."""
    os.kill(os.getpid(), signal.SIGKILL)


def dies_after(function: Callable[..., Any], is_due: Callable[[], bool]) -> Callable[..., Any]:
    """Return the function with an end behind it."""

    def wrapped(*args: Any, **keys: Any) -> Any:
        result = function(*args, **keys)
        if is_due():
            die()
        return result

    return wrapped


def arm() -> None:
    """Put the end where it was asked for."""
    import trainer.checkpoint.checkpointer
    import trainer.checkpoint.commit
    import trainer.checkpoint.sharded
    from trainer.distributed.heartbeat import Heartbeat

    reached = [0]
    stage = Heartbeat.stage

    def staged(self: Heartbeat, name: str, step: int | None = None) -> None:
        stage(self, name, step)
        reached[0] = max(reached[0], step or 0)
        if name == POINT and reached[0] >= int(STEP):
            die()

    Heartbeat.stage = staged  # type: ignore[method-assign]

    def is_due() -> bool:
        return reached[0] >= int(STEP)

    checkpointer, commit, sharded = (
        trainer.checkpoint.checkpointer,
        trainer.checkpoint.commit,
        trainer.checkpoint.sharded,
    )
    if POINT == "written":
        checkpointer.save_verified = dies_after(checkpointer.save_verified, is_due)  # type: ignore[attr-defined]
        sharded.save_verified = dies_after(sharded.save_verified, is_due)  # type: ignore[attr-defined]
    elif POINT == "hashed":
        commit.file_manifest = dies_after(commit.file_manifest, is_due)  # type: ignore[attr-defined]
    elif POINT == "committed":
        checkpointer.commit = dies_after(checkpointer.commit, is_due)  # type: ignore[attr-defined]


if __name__ == "__main__":
    is_chosen = os.environ.get("RANK", "0") in RANKS.split(",")
    if is_chosen and POINT == "import":
        die()
    if is_chosen:
        arm()
    from trainer.distributed.process_group import leave
    from trainer.train import main

    leave(main(sys.argv[1:]))
