"""Save all weights as DeepSpeed's own shards, one set of files a rank."""

from __future__ import annotations

import shutil
from pathlib import Path

from trainer.compat.deepspeed import catch_write_errors
from trainer.distributed.process_group import from_main, gather_objects
from trainer.engine.engine import Engine


def save_sharded(engine: Engine, partial: Path, name: str) -> str | None:
    """Write each rank's shard with DeepSpeed. A collective.

    Args:
        engine: of the state that is written.
        partial: the folder that the checkpoint is written in; an older one is deleted.
        name: of the folder in it.

    Returns:
        What went wrong on any rank, the same on all of them; ``None`` when nothing did.
    """
    failure = None
    if engine.world.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / name).mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    failure = from_main(failure)
    if failure is not None:
        return failure
    failures: list[str] = []
    rank = engine.world.rank
    try:
        with catch_write_errors(engine.deepspeed, lambda path, error: failures.append(f"rank {rank}: {path}: {error}")):
            engine.deepspeed.save_checkpoint(str(partial / name), tag="state")
    except OSError as error:
        failures.append(f"rank {rank}: {error}")
    return next((failure for on_rank in gather_objects(failures) for failure in on_rank), None)
