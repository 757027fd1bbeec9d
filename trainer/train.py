"""Start training: read the arguments, load the config, turn errors into exit codes. ``python -m trainer.train`` and
torchrun start here, on every rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from trainer import api, deny_others_writing
from trainer.config import TrainConfig, load
from trainer.distributed.rendezvous import refuse_copies
from trainer.errors import INTERRUPTED_EXIT_CODE, AfinaError
from trainer.files import explain_full_disk
from trainer.silence import silence_libraries
from trainer.tracking.counter import loading_libraries
from trainer.tracking.logs import configure_logging, print_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code tells how it ended.

    0 finished, 2 config, data or model, 3 checkpoint, 4 launch, 5 loss not finite or out of memory, 75 stopped on
    request and saved, 130 stopped at once by a second Ctrl-C.
    """
    deny_others_writing()
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description="train one run")
    parser.add_argument("--config", type=Path, default=None, help="a run's config.yaml, to repeat it")
    parser.add_argument("--together", type=Path, default=None, help="a file of trials that share a base")
    parser.add_argument("overrides", nargs="*", help="key=value and group=option")
    parsed = parser.parse_args(arguments)
    configure_logging(rank=0 if os.environ.get("RANK", "0") == "0" else 1)
    with loading_libraries():
        from trainer.distributed import process_group as distributed
        from trainer.training.run import train

        if parsed.together is not None:
            from trainer.together.group import read_group
            from trainer.together.run import train_together

    world = distributed.from_environment()
    configure_logging(rank=world.rank)
    silence_libraries()
    try:
        refuse_copies(os.environ)
        if parsed.together is not None:
            return train_together(read_group(parsed.together), world)
        return train(load(parsed.overrides, parsed.config), world)
    except KeyboardInterrupt:  # the second Ctrl-C: the first one asks to save
        if world.is_main:
            print("stopped at once: what came after the last checkpoint is not saved", file=sys.stderr, flush=True)
        return INTERRUPTED_EXIT_CODE
    except Exception as error:
        known_error = error if isinstance(error, AfinaError) else explain_full_disk(error)
        if known_error is None:
            raise
        if known_error.rank in (None, world.rank):
            rank = f"[rank {world.rank}] " if world.world_size > 1 else ""
            print_line(f"{rank}error: {known_error}", sys.stderr)
        return known_error.exit_code


def load_libraries() -> None:
    """Import what every run imports, so that forks of this process need not. Uses no device and starts no thread."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch

    import trainer.together.run  # noqa: F401
    from trainer.compat.deepspeed import skip_shm_build

    if not torch.cuda.is_available():
        skip_shm_build(on_cpu=True)  # asks DeepSpeed which of its operators could be built, which takes a second
    silence_libraries()


class _Callable(ModuleType):
    """Once imported, this module stands in the package where ``trainer.train(config)`` stood: it can be called, too."""

    def __call__(self, config: TrainConfig) -> api.Result:
        return api.train(config)


sys.modules[__name__].__class__ = _Callable


if __name__ == "__main__":
    code = main()
    from trainer.distributed.process_group import leave

    leave(code)
