"""Assemble the command `afina`: a thin layer of verbs over the config tree.

Nothing heavy is imported before it is needed: `afina --help` and a refused config answer without loading torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from trainer import deny_others_writing, keep_working_folder_out
from trainer.cli import finished_run, inspection, jobs, runs, training
from trainer.cli.completion import SCRIPTS
from trainer.cli.help import PANELS, Verb
from trainer.compat.typer import use_completion_scripts
from trainer.errors import AfinaError
from trainer.files import explain_full_disk
from trainer.tracking.logs import configure_logging, print_line

app = typer.Typer(
    name="afina",
    help="Fine-tune causal language models. Overrides are Hydra's: method.r=16 data=alpaca zero=stage3.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order in which `afina --help` lists them.
VERBS: dict[str, Callable[..., object]] = {
    "train": training.train,
    "sweep": training.sweep,
    "compare": training.compare,
    "report": inspection.report,
    "runs": runs.runs,
    "show": runs.show,
    "config": inspection.config,
    "doctor": inspection.doctor,
    "data": inspection.data,
    "fetch": inspection.fetch,
    "eval": finished_run.evaluate,
    "generate": finished_run.generate,
    "chat": finished_run.chat,
    "merge": finished_run.merge,
    "status": jobs.status,
    "logs": jobs.logs,
    "cancel": jobs.cancel,
    "slurm-script": jobs.slurm_script,
    "version": inspection.version,
}
for verb_name, verb in VERBS.items():
    app.command(name=verb_name, cls=Verb, rich_help_panel=PANELS[verb_name])(verb)
use_completion_scripts(SCRIPTS)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"afina {package_version('afina')}")
        raise typer.Exit


@app.callback()
def before_any_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. What a user can fix is one line on stderr, without a traceback."""
    keep_working_folder_out()
    deny_others_writing()
    configure_logging(stream=sys.stderr)  # stdout is for what was asked for
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = app(arguments or ["--help"], prog_name="afina", standalone_mode=False)
    except AfinaError as error:
        print_line(f"error: {error}", sys.stderr)
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
            print_line(f"error: {full}", sys.stderr)
            return full.exit_code
        # a wrong verb or option: the class is click's, or typer's own copy of it, so it is known by what it can do
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        page = context.command_path if context else "afina"
        print_line(f"error: {error.format_message()} → {page} --help", sys.stderr)
        return int(getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
