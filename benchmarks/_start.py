"""How long each part of a training's start takes, up to the begin of its first step.

python benchmarks/_start.py RESULT.json [overrides]
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import trainer.train  # noqa: E402  its import is the first part
import trainer.training.build  # noqa: E402
import trainer.training.job  # noqa: E402
from trainer.training.loop import Loop  # noqa: E402

# The functions that a start calls, and the part that each is.
PARTS = (
    (trainer.training.job, "load_data", "data"),
    (trainer.training.build, "load_model", "model"),
    (trainer.training.build, "choose_packing_and_kernels", "start-up verification"),
)


class FirstStepReached(Exception):
    """Ends the training where its first step begins."""


def main(result_file: Path, overrides: list[str]) -> None:
    """Start once, and stop where the first step begins."""
    seconds = {"imports": time.perf_counter() - BEGIN}
    for module, name, title in PARTS:
        setattr(module, name, timed(getattr(module, name), title, seconds))

    def stop(*_: Any) -> None:
        seconds["all the rest"] = time.perf_counter() - BEGIN - sum(seconds.values())
        result_file.write_text(json.dumps(seconds))
        raise FirstStepReached

    assert callable(Loop.step)
    Loop.step = stop  # type: ignore[assignment, method-assign]
    with contextlib.suppress(FirstStepReached):
        trainer.train.main(overrides)


def timed(function: Any, title: str, seconds: dict[str, float]) -> Any:
    """Return the same function, whose time is added to ``seconds``."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[title] = seconds.get(title, 0.0) + time.perf_counter() - begin
        return result

    return measured


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
