"""How many trials run at once, and which of them one process trains together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.environment import visible_gpus
from launch.sweep.space import Space
from launch.together import group_trials
from launch.trials import Trial
from trainer.errors import ConfigError


def trials_at_once(space: Space) -> int:
    """Return how many trials run at once, by `sweep.parallel` and the GPUs of this machine.

    Raises:
        ConfigError: there are fewer devices than that.
    """
    wanted, gpus = space.config.sweep.parallel, visible_gpus()
    if space.config.launch.kind == "torchrun":
        if wanted not in ("auto", 1):
            reason = "launch=torchrun gives each trial all devices"
            raise ConfigError("sweep.parallel", value=wanted, reason=reason, hint="launch=here or sweep.parallel=1")
        return 1
    if wanted == "auto":
        return max(1, gpus)
    if 0 < gpus < wanted:
        reason = f"each trial has a GPU of its own, and {gpus} can be seen"
        raise ConfigError("sweep.parallel", value=wanted, reason=reason, hint=f"sweep.parallel={gpus}")
    return int(wanted)


def fuse_of(space: Space) -> str | int:
    """Return how many trials a process trains, as `sweep.fuse` says it: ``auto`` leaves `tpe` as it is, which would
    choose other trials if it chose several at a time."""
    settings = space.config.sweep
    return "off" if settings.fuse == "auto" and settings.sampler == "tpe" else settings.fuse


def describe(space: Space, trials: Sequence[Trial]) -> Iterator[str]:
    """Yield in words which trials one process trains together, and why others are trained alone."""
    fuse = fuse_of(space)
    if space.config.launch.kind == "slurm":
        yield "each alone: under launch=slurm a trial is an element of a job array"
        return
    alone: dict[str, list[str]] = {}
    for found in group_trials(trials, fuse, trials_at_once(space)):
        names = [trials[place].name for place in found.places]
        if found.alone is None:
            yield f"together in one process (sweep.fuse={fuse}): {', '.join(names)}"
        else:
            alone.setdefault(found.alone, []).extend(names)
    for reason, names in alone.items():
        yield f"{'each ' if len(names) > 1 else ''}alone: {', '.join(names)} ({reason})"


def describe_chosen(space: Space) -> str:
    """Say how many of the trials that results choose one process trains together."""
    fuse = fuse_of(space)
    if fuse in ("off", 1):
        return "each alone: sweep.fuse=N would choose N at a time, and one process would train them"
    return f"{fuse} chosen at a time, those that are alike trained together in one process"
