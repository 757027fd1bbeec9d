"""Watch over the ranks of a run, and say in one line which of them it was lost by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.distributed.heartbeat import Heartbeat, clear_heartbeats
from trainer.distributed.process_group import World, is_lost_connection
from trainer.errors import LaunchError, NotFiniteError
from trainer.tracking.files import describe_error


@contextmanager
def watched(
    run_dir: Path, world: World, timeout_seconds: float, record_failure: Callable[[Exception], None]
) -> Iterator[Heartbeat]:
    """Keep a heartbeat inside the ``with`` block. What fails inside is recorded; where another rank was lost, the error
    names it, on one rank only. A collective.

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

    clear_heartbeats(run_dir, world)
    with Heartbeat(run_dir, world, timeout_seconds, on_hang) as heartbeat:
        try:
            yield heartbeat
        except Exception as error:
            if not is_lost_connection(error):
                _tell_others(heartbeat, world, error)
                record_failure(error)
                raise
            verdict = heartbeat.explain()
            if not heartbeat.gives_verdict():
                raise SystemExit(LaunchError.exit_code) from error
            lost = _lost(run_dir, verdict + heartbeat.dump())
            record_failure(lost)
            raise lost from error


def _tell_others(heartbeat: Heartbeat, world: World, error: Exception) -> None:
    """Say where this rank was when it failed. What every rank raises alike is no rank's own failure."""
    if world.world_size == 1 or isinstance(error, NotFiniteError):
        return
    described = describe_error(error, world.rank)
    where = heartbeat.failed(f"{described['kind']}: {described['message']}")
    if heartbeat.gives_verdict() and where.step:
        print(f"{where}: fails, and ends the run", file=sys.stderr, flush=True)


def _lost(run_dir: Path, verdict: str) -> LaunchError:
    return LaunchError(str(run_dir), reason=verdict, hint="the same command goes on after the newest checkpoint")
