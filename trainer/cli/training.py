"""Verbs that train: one run, a sweep, a comparison of methods."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.inspection import print_config
from trainer.cli.options import ConfigFile, DryRun, Overrides
from trainer.errors import ConfigError
from trainer.tracking.logs import print_line

if TYPE_CHECKING:
    from trainer.config import TrainConfig

logger = logging.getLogger(__name__)


def train(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    dry_run: DryRun = False,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="every combination a run: same as sweep")] = False,
) -> int:
    """Check the config, then train; given again: resume.

    Here, with launch=torchrun in a process a device, with launch=slurm as a job. A finished run is not trained again.
    """
    arguments = overrides or []
    if multirun:
        return sweep(arguments, config_file, dry_run)
    import trainer.config
    from trainer.checkpoint.finished import answer_of_finished
    from trainer.config.rules.rows import check_row_count

    config = trainer.config.load(arguments, config_file)
    if config.sweep.axes or config.sweep.alpha_over_rank:
        hint = f"afina sweep {shlex.join(arguments)}"
        raise ConfigError("sweep.axes", reason="are those of a sweep, and this is one run", hint=hint)
    if not dry_run:
        if (said := answer_of_finished(config)) is not None:
            print("\n".join(said))
            return 0
        check_row_count(config)
    if config.launch.kind == "slurm":
        from launch.slurm import submit

        if not dry_run:
            return submit.submit(config, arguments, config_file)
        print(submit.describe(config, arguments, config_file), end="")
        return 0
    if dry_run:
        print(f"# would run: {shlex.join(train_command(config, arguments, config_file))}")
        print(f"# in folder: {trainer.config.run_folder(config)}")
        print_config(config, arguments, config_file)
        return 0
    from trainer.models.hub import check_hub

    check_hub(config)  # before torch
    if config.launch.kind == "torchrun":
        from launch import torchrun

        logger.info(f"starting torchrun: {torchrun.ranks_per_node(config)} processes")
        return torchrun.launch(config, arguments, config_file)
    from trainer.train import main

    return main([*(["--config", str(config_file)] if config_file else []), *arguments])


def sweep(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    dry_run: DryRun = False,
    wandb_file: Annotated[
        Path | None,
        typer.Option("--wandb-file", metavar="FILE", help="write the sweep for W&B's agents, start nothing"),
    ] = None,
) -> int:
    """Train every combination of values, rank the runs.

    Values by commas, or a sweep of conf/sweep: rank_alpha, learning_rate, targets.
    """
    import launch.sweep.sweep
    from launch.sweep.space import read_space
    from trainer.models.hub import check_hub

    arguments = overrides or []
    if dry_run or wandb_file is not None:
        return _show_sweep(arguments, config_file, wandb_file)
    config = read_space(arguments, config_file).config
    if config.launch.kind == "slurm":
        from launch.slurm.submit import submit_sweep

        folder, trials = launch.sweep.sweep.plan_sweep(arguments, config_file)
        return submit_sweep(trials[0].config, folder, trials, config_file)
    check_hub(config)
    return launch.sweep.sweep.run_sweep(arguments, config_file)


def _show_sweep(overrides: list[str], config_file: Path | None, wandb_file: Path | None) -> int:
    """Say what a sweep would run, or write it as a file of W&B."""
    from launch.sweep import fusing, plan, space
    from launch.sweep import wandb_file as wandb

    found = space.read_space(overrides, config_file)
    if wandb_file is not None:
        print(f"# written: {wandb_file}\n{wandb.write_wandb_file(wandb_file, found)}")
        return 0
    if found.config.sweep.sampler == "tpe":
        placed = plan.Placement(found)
        print(f"# sweep of {placed.count} runs in {placed.folder}, each chosen by the results of those before it")
        for axis in found.axes:
            print(f"# {axis.key}: {axis.interval or ', '.join(axis.values)}")
        print(f"# {fusing.describe_chosen(found)}")
        return 0
    folder, trials = plan.plan(found)
    print(f"# sweep of {len(trials)} runs in {folder}")
    for trial in trials:
        print(f"# {trial.name}\n{shlex.join(train_command(trial.config, trial.overrides, config_file))}")
    for line in fusing.describe(found, trials):
        print_line(f"# {line}")
    return 0


def compare(overrides: Overrides = None, dry_run: DryRun = False) -> int:
    """Train methods side by side: memory, speed, quality.

    On the same rows in the same order; a table and a picture.
    """
    import launch.compare.compare

    if not dry_run:
        return launch.compare.compare.run_comparison(overrides or [])
    folder, candidates = launch.compare.compare.plan_comparison(overrides or [])
    print(f"# comparison of {len(candidates)} methods in {folder}")
    for candidate in candidates:
        print_line(f"# {candidate.name}: {candidate.refused or f'learning rate {candidate.rate:g}'}")
    return 0


def train_command(config: TrainConfig, overrides: list[str], config_file: Path | None) -> list[str]:
    """Return the command line of the process (or of torchrun's agent) that would train this config."""
    from launch import torchrun

    if config.launch.kind == "torchrun":
        return torchrun.command(config, overrides, config_file)
    return [sys.executable, "-m", "trainer.train", *torchrun.train_arguments(config, overrides, config_file)]
