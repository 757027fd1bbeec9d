"""A process that trains trials together, or one after another by themselves, and is disturbed at a chosen point.

python together_rank.py together FILE | alone FILE

AFINA_DISTURB holds what happens, in JSON: ``{"point", "step", "nth", "action"}`` (kill, term or raise: at the nth
time that the point is passed from that step on) and ``{"spoiled": {adapter: steps}}`` (their loss sums are infinite in
these steps; alone, that of the run whose place in FILE is the adapter's).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


class Disturbance:
    """Where this process is, and what is to happen to it there."""

    def __init__(self) -> None:
        self.step, self.stage, self.passed = 0, "", 0
        self.alone: str | None = None
        self.wanted: dict[str, Any] = json.loads(os.environ.get("AFINA_DISTURB", "{}"))

    def passes(self, point: str) -> None:
        """Send the signal where it is due."""
        if point != self.wanted.get("point") or self.step < self.wanted["step"]:
            return
        self.passed += 1
        if self.passed == self.wanted["nth"]:
            if self.wanted["action"] == "raise":
                raise RuntimeError("put in by the test")
            os.kill(os.getpid(), SIGNALS[self.wanted["action"]])

    def is_spoiled(self, adapter: str) -> bool:
        steps = self.wanted.get("spoiled", {}).get(adapter, [])
        return self.stage == "forward and backward" and self.step in steps

    def watch(self) -> None:
        """Put all points in place."""
        import trainer.checkpoint.checkpointer as checkpointer
        import trainer.together.loop as loop
        from trainer.distributed.heartbeat import Heartbeat
        from trainer.engine.zero_engine import ZeroEngine
        from trainer.together.engine import TrialsEngine
        from trainer.together.trial import Trial

        stage = Heartbeat.stage

        def staged(heartbeat: Heartbeat, name: str, at: int | None = None) -> None:
            stage(heartbeat, name, at)
            self.stage, self.step = name, self.step if at is None else at
            self.passes(name)

        Heartbeat.stage = staged  # type: ignore[method-assign]
        checkpointer.commit = self._around(checkpointer.commit, after="committed")
        loop.write_saves = self._around(loop.write_saves, before="before the marker", after="marked")
        Trial.finish = self._around(Trial.finish, after="ended")  # type: ignore[method-assign]
        alone, together = ZeroEngine.loss_sum, TrialsEngine.loss_sum
        # a factor, so that the backward is as spoiled as the loss
        ZeroEngine.loss_sum = lambda engine, batch: (  # type: ignore[method-assign]
            alone(engine, batch) * (float("inf") if self.is_spoiled(str(self.alone)) else 1.0)
        )

        def loss_sum(engine: TrialsEngine, batch: Any) -> Any:
            sums = together(engine, batch)
            factors = [float("inf") if self.is_spoiled(name) else 1.0 for name in engine.active.names]
            return sums * sums.new_tensor(factors)

        TrialsEngine.loss_sum = loss_sum  # type: ignore[method-assign]

    def _around(self, function: Callable[..., Any], before: str = "", after: str = "") -> Callable[..., Any]:
        def wrapped(*args: Any, **keys: Any) -> Any:
            self.passes(before)
            result = function(*args, **keys)
            self.passes(after)
            return result

        return wrapped


def main(arguments: Sequence[str]) -> int:
    """Return the exit code of ``trainer.train``; of several runs the largest."""
    import trainer.train

    how, file = arguments
    disturbance = Disturbance()
    disturbance.watch()
    if how == "together":
        return trainer.train.main(["--together", file])
    content = json.loads(Path(file).read_text())
    codes = []
    for place, overrides in enumerate(content["trials"]):
        disturbance.alone = f"trial_{place}"
        codes.append(trainer.train.main(overrides))
    return max(codes)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    from trainer.distributed.process_group import leave

    leave(code)
