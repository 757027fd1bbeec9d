"""Write the batch script of a job: slurm/train.sbatch with the options of the ``launch`` group in it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import trainer.config
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.tracking.files import find_summary

WARN_SECONDS = 120
SAVES_BEFORE_LIMIT = 3  # a save that is slower than it was must be done in time, too
_OPTIONS = ("# ---- options", "# ---- end of options")
_SETUP = ("# ---- setup", "# ---- end of setup")


def template(config: TrainConfig) -> str:
    """Return the batch script to fill in: ``launch.script``, or the one that comes with the program."""
    own = config.launch.script
    return (Path(own).expanduser() if own else find_template()).read_text(encoding="utf-8")


def find_template() -> Path:
    """Return where slurm/train.sbatch is: in the checkout, or inside an installed wheel."""
    package = Path(trainer.config.__file__).parents[1]
    return next(
        path
        for path in (package / "slurm" / "train.sbatch", package.parent / "slurm" / "train.sbatch")
        if path.is_file()
    )


def render(config: TrainConfig, folder: Path | None = None, setup: Sequence[str] = (), array: str = "") -> str:
    """Return the batch script for a config.

    Args:
        config: whose ``launch`` group says what to ask Slurm for.
        folder: where Slurm's output goes, and whose run says how long a save takes; ``None``: the working folder.
        setup: shell lines before those of ``launch.setup``.
        array: of a sweep: ``0-7%2``.

    Raises:
        ConfigError: ``launch.script`` has lost the lines that mark where options and setup go.
    """
    launch = config.launch
    text = _put(template(config), _OPTIONS, _options(config, folder, array), config)
    lines = [*setup, *launch.setup]
    if launch.nproc_per_node:
        lines.append(f"export AFINA_NPROC_PER_NODE={launch.nproc_per_node}")
    if launch.srun_args:
        lines.append(f"srun_args=({shlex.join(launch.srun_args)})")
    return _put(text, _SETUP, lines, config) if lines else text


def _options(config: TrainConfig, folder: Path | None, array: str) -> list[str]:
    launch = config.launch
    output = "slurm-%A_%a.out" if array else "slurm-%j.out"
    asked = {
        "nodes": launch.nodes,
        "array": array or None,
        "gpus-per-node": launch.gpus_per_node,
        "cpus-per-task": launch.cpus_per_node,
        "mem": launch.memory,
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "output": folder.absolute() / output if folder else output,
        "signal": f"B:USR1@{warn_seconds(config, folder)}",
    }
    options = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    return [f"#SBATCH {option}" for option in [*options, *launch.sbatch_args]]


def warn_seconds(config: TrainConfig, folder: Path | None) -> int:
    """Return how long before the time limit the run is asked to save: by what its longest save so far has taken."""
    if config.launch.warn_seconds is not None:
        return config.launch.warn_seconds
    taken = find_summary(folder).get("save_seconds") if folder else None
    return max(WARN_SECONDS, round(SAVES_BEFORE_LIMIT * taken) if isinstance(taken, (int, float)) else 0)


def _put(text: str, marks: tuple[str, str], lines: Sequence[str], config: TrainConfig) -> str:
    """Replace what stands between two marks."""
    before, first, rest = text.partition(marks[0])
    title, newline, body = rest.partition("\n")
    _, last, after = body.partition(marks[1])
    if not (first and newline and last):
        reason = f"has lost its lines {marks[0]} and {marks[1]}, which say where these go"
        raise ConfigError("launch.script", value=config.launch.script, reason=reason, hint="afina slurm-script")
    return "".join([before, first, title, newline, *(f"{line}\n" for line in lines), last, after])
