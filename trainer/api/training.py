"""Load a config and train it in this process, which is afterwards as it was before."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trainer.config
from trainer.api.restore import restored
from trainer.config import TrainConfig
from trainer.config.rules.check import check
from trainer.distributed.rendezvous import refuse_copies
from trainer.errors import AfinaError, LaunchError
from trainer.files import explain_full_disk
from trainer.tracking.files import find_summary
from trainer.tracking.logs import configure_logging


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        folder: the run folder.
        status: ``finished``, or ``preempted``: it was asked to stop and has saved; train it again and it goes on.
        steps: updates, over all lives of the run.
        metrics: scores of the weights that it ends with (``eval_loss``, …), and before training (``eval_loss_before``).
        adapter: the folder of the adapter (``method=full``: of the whole model); ``None`` before the run is finished.
    """

    folder: Path
    status: str
    steps: int
    metrics: dict[str, float]
    adapter: Path | None


def load(overrides: Sequence[str] = (), config_file: str | Path | None = None) -> TrainConfig:
    """Load the config that overrides ask for, as ``afina config`` prints it. Loads no torch.

    Args:
        overrides: as they are typed behind ``afina train``: ``["experiment=demo", "method.r=8"]``.
        config_file: a run's ``config.yaml``, to repeat it, or one of a few keys and options, laid over ``conf/``.

    Raises:
        ConfigError: one of them cannot be used.
    """
    typed = [overrides] if isinstance(overrides, str) else overrides
    return trainer.config.load(typed, None if config_file is None else Path(config_file))


def train(config: TrainConfig) -> Result:
    """Train one run in this process, on one device; what ``python -m trainer.train`` does, and leaves.

    It prints the same lines. An interrupted run resumes, a finished one is not trained again. Ctrl-C (or SIGTERM) asks
    to save and stop; a second Ctrl-C is a ``KeyboardInterrupt``. Signal handlers, environment, logging and process
    group are as before when it returns or raises.

    Raises:
        ConfigError, DataError, ModelError: it cannot be trained as asked for.
        CheckpointError: the run cannot be resumed.
        LaunchError: somebody else trains it, or this process is one of several ranks.
        TrainingError: a loss is not finite, or memory has run out.
    """
    check(config)
    _refuse_ranks()
    folder = trainer.config.run_folder(config).absolute()
    with restored():
        import torch

        from trainer.distributed.process_group import from_environment, shutdown
        from trainer.engine.device import give_back_memory
        from trainer.silence import silence_libraries
        from trainer.training.run import train as train_here

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            reason = "needs a process group of its own, and this process has one"
            raise LaunchError("trainer.train", reason=reason, hint="torch.distributed.destroy_process_group()")
        configure_logging()
        silence_libraries()
        world = from_environment()
        try:
            train_here(config, world)
        except AfinaError:
            raise
        except Exception as error:
            if (known := explain_full_disk(error)) is None:
                raise
            raise known from error
        finally:
            shutdown()
            gc.collect()  # the engine's parts hold each other
            give_back_memory(world.device)
    return _result(folder)


def _refuse_ranks() -> None:
    """Refuse to be one of several processes: each would train the whole run, or wait for the others."""
    refuse_copies(os.environ)
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        hint = "torchrun … -m trainer.train, or afina train launch=torchrun"
        raise LaunchError("trainer.train", value=f"{ranks} ranks", reason="trains in one process", hint=hint)


def _result(folder: Path) -> Result:
    summary = find_summary(folder)
    status = str(summary.get("status"))
    adapter = next((path for path in (folder / "adapter", folder / "model") if path.is_dir()), None)
    return Result(
        folder=folder,
        status=status,
        steps=int(summary.get("steps") or 0),
        metrics=dict(summary.get("metrics") or {}),
        adapter=adapter if status == "finished" else None,
    )
