"""Type into a real shell in a pseudo-terminal, and see what its completion makes of the line."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.processes import ROOT

WAIT_SECONDS = 60.0
# How the line is shown when ^G is typed: between two marks, once what was typed before it was done, and taken away.
SET_UP = {
    "bash": r"""show() { printf "<<%s>>\n" "$READLINE_LINE"; READLINE_LINE= READLINE_POINT=0; }
        bind -x '"\C-g": show'; bind 'set bell-style none'""",
    "zsh": """bindkey -e; autoload -Uz compinit; compinit -D; unsetopt beep
        show() { zle -I; print -r -- "<<$BUFFER>>"; BUFFER= }; zle -N show; bindkey '^G' show""",
}
COMMANDS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


class Shell:
    """A shell in a pseudo-terminal, with ``afina`` on its path and its completion read from ``--show-completion``.

    Args:
        name: bash or zsh.
        folder: its working folder; ``afina`` is put into a folder beside it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        programs = folder.parent / f"{folder.name}-bin"
        programs.mkdir()
        afina = programs / "afina"
        afina.write_text(f'#!/bin/sh\nexec {sys.executable} -m trainer.cli "$@"\n')
        afina.chmod(0o755)
        self._seen = ""
        self._terminal, side = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PS1": "$ ", "TERM": "xterm", "COLUMNS": "120"}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        self._process = subprocess.Popen(
            COMMANDS[name], stdin=side, stdout=side, stderr=side, cwd=folder, env=environment, start_new_session=True
        )
        os.close(side)
        script = folder.parent / f"{folder.name}.{name}"
        script.write_text(f'{SET_UP[name]}\neval "$(afina --show-completion)"\necho ready\n')
        self._type(f"source {script}\n")
        self._wait_for("ready")

    def complete(self, line: str, tabs: int = 1) -> str:
        """Return what a line is after it was typed and tab pressed."""
        self._seen = ""
        self._type(line + "\t" * tabs + "\x07")
        shown = self._wait_for("<<(.*)>>")
        return shown[1]

    def listed(self, line: str) -> str:
        """Return all that is shown when tab is pressed again and again: bash lists once nothing can be added."""
        self.complete(line, tabs=3)
        return self._seen

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)

    def _type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def _wait_for(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            if found := re.search(pattern, self._seen):
                return found
            if select.select([self._terminal], [], [], 0.5)[0]:
                self._seen += os.read(self._terminal, 65536).decode(errors="replace")
        raise AssertionError(f"{pattern} did not come: {self._seen!r}")


def missing(name: str) -> str | None:
    """Return why a shell cannot be tried here; ``None`` where it can."""
    return None if shutil.which(name) else f"needs {name} (Debian and Ubuntu: apt-get install {name})"
