"""The command line: one verb a function, over the one config tree."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. What a user can fix is one line on stderr, without a traceback."""
    from trainer.cli.app import main as run_verb

    return run_verb(argv)
