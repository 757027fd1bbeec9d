"""Typer: the scripts that a shell reads for its completion."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.compat import reach


@reach("typer._completion_shared._completion_scripts", until="Typer's own scripts leave no space behind key=")
def use_completion_scripts(scripts: Mapping[str, str]) -> None:
    """Let ``--show-completion`` and ``--install-completion`` give these scripts, by shell; Typer's own stay without.

    Typer's take ``key=`` apart in bash, where ``=`` ends a word, and put a space behind it in zsh.
    """
    import typer._completion_shared as shared

    getattr(shared, "_completion_scripts", {}).update(scripts)
