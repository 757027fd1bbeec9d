"""How long each part of a training's start takes, up to the begin of its first step.

python benchmarks/_start.py RESULT.json [overrides]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()

import trainer.train  # noqa: E402  its import is the first part
from trainer.config import load  # noqa: E402
from trainer.distributed.process_group import from_environment  # noqa: E402
from trainer.silence import silence_libraries  # noqa: E402
from trainer.training.loop import Loop  # noqa: E402

PARTS = {"load_data": "data", "load_model": "model", "choose_packing": "start-up proof"}


class Reached(Exception):
    """The first step."""


def main(result_file: Path, overrides: list[str]) -> None:
    """Start once, and stop where the first step begins."""
    silence_libraries()
    seconds = {"imports": time.perf_counter() - BEGIN}
    for name, title in PARTS.items():
        setattr(trainer.train, name, timed(getattr(trainer.train, name), title, seconds))

    def reached(*_: Any) -> None:
        seconds["all the rest"] = time.perf_counter() - BEGIN - sum(seconds.values())
        result_file.write_text(json.dumps(seconds))
        raise Reached

    Loop._step = reached  # type: ignore[assignment, method-assign]
    trainer.train.train(load(overrides), from_environment())


def timed(function: Any, title: str, seconds: dict[str, float]) -> Any:
    """The same function, whose time goes into ``seconds``."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[title] = seconds.get(title, 0.0) + time.perf_counter() - begin
        return result

    return measured


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
