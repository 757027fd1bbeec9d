"""The command `afina`: a thin layer of verbs over the config tree.

Nothing heavy is imported before it is needed: `afina --help` and a refused config answer without loading torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli import runs as verbs
from trainer.cli.runs import Adapters, Overrides, Run, find_run
from trainer.errors import AfinaError
from trainer.files import explain_full_disk
from trainer.tracking.logs import configure_logging

if TYPE_CHECKING:
    from trainer.config import TrainConfig

app = typer.Typer(
    name="afina",
    help="Fine-tune causal language models. Overrides are Hydra's: method.r=16 data=alpaca zero=stage3.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="start from a config.yaml (of a run, say) instead of the groups"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be run, start nothing")]


@app.command()
def train(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    dry_run: DryRun = False,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="every combination a run: same as sweep")] = False,
) -> int:
    """Check the config, then train. Here, or with launch=torchrun in one process a device."""
    arguments = overrides or []
    if multirun:
        return sweep(arguments, config_file, dry_run)
    import trainer.config

    config = trainer.config.load(arguments, config_file)
    if dry_run:
        print(f"# would run: {shlex.join(train_command(config, arguments, config_file))}")
        print(f"# in folder: {trainer.config.run_folder(config)}")
        print_config(config, arguments, config_file)
        return 0
    if config.launch.kind == "torchrun":
        from launch import torchrun

        return torchrun.launch(config, arguments, config_file)
    import trainer.train

    return trainer.train.main([*(["--config", str(config_file)] if config_file else []), *arguments])


@app.command()
def sweep(overrides: Overrides = None, config_file: ConfigFile = None, dry_run: DryRun = False) -> int:
    """Train every combination, rank the runs. For example method.r=8,16 method.alpha=16,32."""
    import launch.sweep.sweep

    if dry_run:
        folder, trials = launch.sweep.sweep.plan(overrides or [], config_file)
        print(f"# sweep of {len(trials)} runs in {folder}")
        for trial in trials:
            print(f"# {trial.name}\n{shlex.join(train_command(trial.config, trial.overrides, config_file))}")
        return 0
    return launch.sweep.sweep.sweep(overrides or [], config_file)


@app.command()
def compare(overrides: Overrides = None, dry_run: DryRun = False) -> int:
    """Train several methods on the same rows, side by side: memory, speed, quality; a table and a picture."""
    import launch.compare.compare

    if not dry_run:
        return launch.compare.compare.compare(overrides or [])
    folder, candidates = launch.compare.compare.plan(overrides or [])
    print(f"# comparison of {len(candidates)} methods in {folder}")
    for candidate in candidates:
        print(f"# {candidate.name}: {candidate.refused or f'learning rate {candidate.rate:g}'}")
    return 0


@app.command(name="config")
def config_command(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    keys: Annotated[bool, typer.Option("--keys", help="list every key: type, default, meaning")] = False,
) -> None:
    """Print the composed config as YAML. On top: which file each group came from."""
    import trainer.config

    if keys:
        from launch import table

        every: list[trainer.config.Key] = trainer.config.keys()
        rows = [[key.name, key.type, as_yaml(key.default), key.help] for key in every]
        table.show(["key", "type", "default", "meaning"], rows)
        return
    print_config(trainer.config.load(overrides or [], config_file), overrides or [], config_file)


@app.command()
def doctor(
    matrix: Annotated[bool, typer.Option("--matrix", help="every method × base precision × ZeRO stage")] = False,
) -> None:
    """What this machine has for training; with --matrix, what goes with what."""
    from launch import doctor as facts
    from launch import table

    if not matrix:
        table.show(["what", "found"], facts.machine())
        return
    heads, rows, notes = facts.matrix()
    table.show(heads, rows)
    works, refused = facts.count(rows)
    print("\n".join(["", f"{works} cells work, {refused} are refused", *notes]))


@app.command()
def data(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write a page to look at, too")] = None,
    examples: Annotated[int, typer.Option("--examples", metavar="N", min=0, help="rows shown token by token")] = 3,
) -> None:
    """Prepare, check and show the data: what is learnt, token by token, lengths, sharing, refused rows. No model."""
    import trainer.config
    from trainer.view import view

    view(trainer.config.load(overrides or [], config_file), html, examples)


@app.command()
def fetch(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="an embedded model")] = None) -> None:
    """Fetch an embedded model. The last line is its folder; without a name, they are listed."""
    import trainer.models.embedded

    configure_logging(stream=sys.stdout)
    if name is None:
        for embedded in trainer.models.embedded.EMBEDDED:
            print(embedded)
    else:
        print(trainer.models.embedded.fetch(name))


@app.command(name="eval")
def evaluate(run: Run, overrides: Overrides = None, adapters: Adapters = None) -> None:
    """Score a run on its held-out rows. With the run's config and your overrides (eval.metrics=[exact_match])."""
    folder = find_run(run)
    import trainer.inference.use
    from launch import table

    scores = trainer.inference.use.evaluate_run(folder, overrides or [], adapters or [])
    metrics = next(iter(scores.values()))
    rows = [[metric, *(f"{of[metric]:.4f}" for of in scores.values())] for metric in metrics]
    table.show(["metric", *(scores if adapters else ["value"])], rows)


for verb in (verbs.generate, verbs.chat, verbs.merge):
    app.command()(verb)


@app.command()
def version() -> None:
    """Print versions. Of afina, Python, and the libraries that decide whether a number can be repeated."""
    lines = []
    for library in ("afina", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "hydra-core"):
        try:
            lines.append(f"{library} {package_version(library)}")
        except PackageNotFoundError:
            lines.append(f"{library} not installed")
    print("\n".join([lines[0], f"python {platform.python_version()}", *lines[1:]]))


def train_command(config: TrainConfig, overrides: list[str], config_file: Path | None) -> list[str]:
    """The command line of the process (or of torchrun's agent) that would train this config."""
    from launch import torchrun

    if config.launch.kind == "torchrun":
        return torchrun.command(config, overrides, config_file)
    return [sys.executable, "-m", "trainer.train", *torchrun.train_arguments(config, overrides, config_file)]


def print_config(config: TrainConfig, overrides: list[str], config_file: Path | None) -> None:
    """Print a composed config; where each group came from stands on top as comments, so that it stays YAML."""
    import trainer.config

    files = {"all": str(config_file)} if config_file else trainer.config.sources(overrides)
    for group, file in files.items():
        print(f"# {group}: {file}")
    print(trainer.config.to_yaml(config), end="")


def as_yaml(value: object) -> str:
    """A default as it is typed: null and true, not None and True."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. What a user can mend is told in one line on stderr, without a traceback."""
    configure_logging(stream=sys.stderr)  # stdout is for what was asked for
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments or ["--help"], prog_name="afina", standalone_mode=False)
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader (head, less) has what it wanted; without this Python complains again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        full = explain_full_disk(error)
        if full is not None:
            print(f"error: {full}", file=sys.stderr)
            return full.exit_code
        # a wrong verb or option: the class is click's, or typer's own copy of it, so it is known by what it can do
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        page = context.command_path if context else "afina"
        print(f"error: {error.format_message()} → {page} --help", file=sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
