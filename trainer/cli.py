"""The command `afina`: a thin layer of verbs over the config tree.

Nothing heavy is imported before it is needed: `afina --help` and a refused config answer without loading torch.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.errors import AfinaError, CheckpointError, ConfigError

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

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="OVERRIDES", help="key=value, group=choice, +new.key=value, ~key", show_default=False),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="start from a config.yaml (of a run, say) instead of the groups"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be run, start nothing")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or the name of one in runs/")]


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
        print(f"# would run: {shlex.join(command_of(config, arguments, config_file))}")
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
    import launch.sweep

    if dry_run:
        folder, trials = launch.sweep.plan(overrides or [], config_file)
        print(f"# sweep of {len(trials)} runs in {folder}")
        for trial in trials:
            print(f"# {trial.name}\n{shlex.join(command_of(trial.config, trial.overrides, config_file))}")
        return 0
    return launch.sweep.sweep(overrides or [], config_file)


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

    view(trainer.config.load(overrides or [], config_file), html, examples, lambda text: print(text, file=sys.stderr))


@app.command()
def merge(
    run: Run,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="the folder that is made")],
    overrides: Overrides = None,
) -> None:
    """Merge a run's adapter into its base, proved: read back from disk and compared with the live adapter."""
    import trainer.inference

    result = trainer.inference.merge_run(find_run(run), to, overrides or [])
    allowed = f"{result.bound:g} is allowed"
    print(f"logits of {result.prompts} prompts: {result.distance:.1e} from the live adapter's; {allowed}")
    print(f"likeliest token: the same at {100 * result.same_choice:.1f} % of the positions")
    if result.trained_distance is not None:
        print(f"trained on a quantised base: {result.trained_distance:.1e} from the adapter there")
    print(f"merged: {to}")


@app.command()
def fetch(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="an embedded model")] = None) -> None:
    """Fetch an embedded model. The last line is its folder; without a name, they are listed."""
    import trainer.fetch

    if name is None:
        for embedded in trainer.fetch.EMBEDDED:
            print(embedded)
    else:
        print(trainer.fetch.fetch(name))


@app.command(name="eval")
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Score a run on its held-out rows. With the run's config and your overrides (eval.metrics=[exact_match])."""
    folder = find_run(run)
    import trainer.inference
    from launch import table

    metrics = trainer.inference.evaluate_run(folder, overrides or [])
    rows = [[name, f"{value:.4f}" if isinstance(value, float) else str(value)] for name, value in metrics.items()]
    table.show(["metric", "value"], rows)


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="what the user says", show_default=False)],
    overrides: Overrides = None,
    input: Annotated[str, typer.Option(metavar="TEXT", help="what the prompt is about, as in an Alpaca row")] = "",
    adapter: Annotated[bool, typer.Option("--adapter/--no-adapter", help="with or without what was trained")] = True,
    bits: Annotated[int | None, typer.Option(metavar="16|8|4", help="hold the base in so many bits")] = None,
    device_map: Annotated[str | None, typer.Option(metavar="MAP", help="auto spreads a big base over devices")] = None,
) -> None:
    """Answer a prompt with a run's model. Sampling is set by overrides: generate.max_new_tokens=20."""
    if bits not in (None, 16, 8, 4):
        raise ConfigError("--bits", value=bits, rule="must be 16, 8 or 4", cure="leave it out for the run's own")
    folder = find_run(run)
    import trainer.inference

    print(
        trainer.inference.generate_run(
            folder, prompt, input=input, adapter=adapter, bits=bits, device_map=device_map, overrides=overrides or []
        )
    )


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


def command_of(config: TrainConfig, overrides: list[str], config_file: Path | None) -> list[str]:
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


def find_run(run: str) -> Path:
    """The folder of a run named by its path or by its name in runs/.

    Raises:
        CheckpointError: there is no such run; the nearest name in runs/ is suggested.
    """
    for folder in (Path(run), Path("runs") / run):
        if (folder / "config.yaml").is_file():
            return folder
    near = get_close_matches(Path(run).name, [path.parent.name for path in Path("runs").glob("*/config.yaml")], n=1)
    cure = f"did you mean runs/{near[0]}?" if near else "give the folder that `afina train` wrote"
    raise CheckpointError("run", value=run, rule="is not a run folder (no config.yaml there)", cure=cure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. What a user can mend is told in one line on stderr, without a traceback."""
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
