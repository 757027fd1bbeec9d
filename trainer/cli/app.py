"""Assemble the command `afina`: a thin layer of verbs over the config tree.

Nothing heavy is imported before it is needed: `afina --help` and a refused config answer without loading torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import typer

from trainer import deny_others_writing, keep_working_folder_out
from trainer.cli import finished_run, inspection, jobs, runs, training
from trainer.errors import AfinaError
from trainer.files import explain_full_disk
from trainer.tracking.logs import configure_logging

app = typer.Typer(
    name="afina",
    help="Fine-tune causal language models. Overrides are Hydra's: method.r=16 data=alpaca zero=stage3.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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
    app.command(name=verb_name)(verb)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. What a user can fix is one line on stderr, without a traceback."""
    keep_working_folder_out()
    deny_others_writing()
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
