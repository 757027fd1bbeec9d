"""Watch over the ranks of a run, and say in one line which of them it was lost by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.process_group import World, is_lost_connection
from trainer.errors import AfinaError, LaunchError


@contextmanager
def watched(
    run_dir: Path, world: World, timeout_seconds: float, record_failure: Callable[[Exception], None]
) -> Iterator[Heartbeat]:
    """Keep a heartbeat inside the ``with`` block. What fails inside is recorded; where another rank was lost, the error
    names it, on one rank only, and not where that rank has said itself why it leaves.

    Args:
        run_dir: the run folder.
        world: this process.
        timeout_seconds: that a stage of a step may last.
        record_failure: writes the summary of the failed run.
    """

    def on_hang(verdict: str) -> None:
        error = _lost(run_dir, verdict)
        record_failure(error)
        print(f"error: {error}", file=sys.stderr, flush=True)

    with Heartbeat(run_dir, world, timeout_seconds, on_hang) as heartbeat:
        try:
            yield heartbeat
        except Exception as error:
            if not is_lost_connection(error):
                if isinstance(error, AfinaError):
                    heartbeat.gives_verdict()  # taken: the others will miss this rank, and it says why itself
                record_failure(error)
                raise
            verdict = heartbeat.explain()
            if not heartbeat.gives_verdict():
                raise SystemExit(LaunchError.exit_code) from error
            lost = _lost(run_dir, verdict)
            record_failure(lost)
            raise lost from error


def _lost(run_dir: Path, verdict: str) -> LaunchError:
    return LaunchError(str(run_dir), reason=verdict, hint="the same command goes on after the newest checkpoint")
