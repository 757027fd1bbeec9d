"""One rank of a training that kills itself at a given point, as ``kill -9`` would, or stops or fails there.

AFINA_CHAOS=POINT:STEP:RANKS:ACTION python benchmarks/_chaos_rank.py [overrides]

RANKS: 0, 1 or 0,1. ACTION: kill, stop or raise.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any


def die(action: str = "kill") -> None:
    """End this process as it stands."""
    if action == "raise":
        raise RuntimeError("put in by chaos")
    os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)


def dies_after(function: Callable[..., Any], is_due: Callable[[], bool]) -> Callable[..., Any]:
    """Return the function with an end behind it."""

    def wrapped(*args: Any, **keys: Any) -> Any:
        result = function(*args, **keys)
        if is_due():
            die()
        return result

    return wrapped


def arm(point: str, step: int, action: str) -> None:
    """Put the end where it was asked for."""
    import trainer.checkpoint.checkpointer
    import trainer.checkpoint.commit
    import trainer.checkpoint.sharded
    import trainer.training.run
    from trainer.distributed.heartbeat import Heartbeat

    reached = [0]
    stage = Heartbeat.stage

    def staged(self: Heartbeat, name: str, at: int | None = None) -> None:
        stage(self, name, at)
        reached[0] = max(reached[0], at or 0)
        if name == point and is_due():
            die(action)

    def is_due() -> bool:
        return reached[0] >= step

    Heartbeat.stage = staged  # type: ignore[method-assign]
    run, checkpoint = trainer.training.run, trainer.checkpoint
    places: dict[str, list[tuple[Any, str]]] = {
        "built": [(run, "build")],
        "resumed": [(run, "create_loop")],
        "written": [(checkpoint.checkpointer, "save_verified"), (checkpoint.sharded, "save_verified")],
        "hashed": [(checkpoint.commit, "file_manifest")],
        "committed": [(checkpoint.checkpointer, "commit")],
        "final written": [(run, "save_final")],
    }
    at_start = point in ("built", "resumed")
    for owner, name in places.get(point, []):
        setattr(owner, name, dies_after(getattr(owner, name), (lambda: True) if at_start else is_due))


def main(overrides: Sequence[str]) -> int:
    """Train as one rank; the exit code is ``trainer.train``'s."""
    point, step, ranks, action = os.environ.get("AFINA_CHAOS", "none:0::kill").split(":")
    if os.environ.get("RANK", "0") in ranks.split(","):
        if point == "import":
            die()
        arm(point, int(step), action)
    from trainer.train import main as train

    return train(overrides)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    from trainer.distributed.process_group import leave

    leave(code)
