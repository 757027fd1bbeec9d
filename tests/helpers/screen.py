"""Record what a command shows, and when: on a pseudo-terminal of so many columns, or in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyte

from tests.helpers.processes import stop_tree

ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:[34][0-8]|9[0-7]|10[0-7])[0-9;]*m")
LINES = 1000  # of the screen that is kept: more than a command writes, so that nothing scrolls off
# What the machine of the test may have set, and a user's shell has not.
UNSET = ("NO_COLOR", "FORCE_COLOR", "CI", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS")


@dataclass(slots=True)
class Recording:
    """What a command has shown.

    Attributes:
        chunks: (seconds since its start, text) as they came, stdout and stderr interleaved.
        seconds: that it took.
        returncode: negative for a signal.
        columns: of its terminal; ``None``: it was a pipe.
        stdout: what came on stdout, where that was a pipe of its own (``stdout_apart``).
    """

    chunks: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    returncode: int = 0
    columns: int | None = None
    stdout: str = ""

    @property
    def raw(self) -> str:
        """Return all that was shown, escapes and carriage returns included."""
        return "".join(text for _, text in self.chunks)

    @property
    def first_line_seconds(self) -> float:
        """Return when the first letter came that a user can see; infinity: never."""
        return next((at for at, text in self.chunks if ESCAPE.sub("", text).strip()), float("inf"))

    @property
    def longest_silence_seconds(self) -> float:
        """Return the longest time without anything new to see after the first line, to the end of the command."""
        times = [at for at, text in self.chunks if ESCAPE.sub("", text).strip()]
        return max((later - earlier for earlier, later in zip(times, [*times[1:], self.seconds])), default=self.seconds)

    @property
    def has_escapes(self) -> bool:
        """Return whether anything was written that only a terminal understands."""
        return "\x1b" in self.raw or "\r" in self.raw.replace("\r\n", "\n" if self.columns else "\r\n")

    @property
    def has_colours(self) -> bool:
        """Return whether any colour was set; bold and dim are none."""
        return COLOUR.search(self.raw) is not None

    def screen(self) -> list[str]:
        """Return the lines as they stand at the end, bars that were taken away left out; nothing has scrolled off."""
        return self.screen_at(float("inf"))

    def screen_at(self, seconds: float) -> list[str]:
        """Return the lines that a user sees after so many seconds."""
        screen = pyte.Screen(self.columns or 2000, LINES)
        stream = pyte.Stream(screen)
        for at, text in self.chunks:
            if at <= seconds:
                stream.feed(text if self.columns else text.replace("\n", "\r\n"))
        return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")

    def widest_line(self) -> int:
        """Return the columns of the widest line that was written, before a terminal would wrap it."""
        text = ESCAPE.sub("", self.raw).replace("\r\n", "\n")
        return max(len(part) for line in text.split("\n") for part in line.split("\r"))


def record(
    command: Sequence[str | os.PathLike[str]],
    *,
    columns: int | None = 80,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    typed: str = "",
    stdout_apart: bool = False,
    timeout_seconds: float = 300,
) -> Recording:
    """Run a command to its end and record what it shows.

    Args:
        command: its words.
        columns: of the pseudo-terminal; ``None``: stdout and stderr are one pipe.
        env: laid over this process's environment; ``NO_COLOR`` and its like come from here alone.
        cwd: where it runs.
        typed: its stdin, typed at once; on a terminal Ctrl-D follows, in a pipe it ends there.
        stdout_apart: stdout is a pipe, read into ``Recording.stdout``, and stderr alone is recorded.
        timeout_seconds: after them it is ended, and the test fails.
    """
    words = [os.fspath(word) for word in command]
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    environment |= {"TERM": "xterm-256color", **(env or {})}
    ours, theirs = pty.openpty() if columns else os.pipe()
    apart = os.pipe() if stdout_apart else None
    if columns:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    begin = time.monotonic()
    process = subprocess.Popen(
        words,
        env=environment,
        cwd=cwd,
        stdin=theirs if columns else subprocess.PIPE,
        stdout=apart[1] if apart else theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    if apart:
        os.close(apart[1])
    _type(process, ours if columns else None, typed)
    recording = Recording(columns=columns)
    try:
        _read(recording, ours, apart[0] if apart else None, begin, timeout_seconds)
        recording.returncode = process.wait(max(1.0, timeout_seconds - (time.monotonic() - begin)))
    finally:
        stop_tree(process)
        os.close(ours)
        if apart:
            os.close(apart[0])
    recording.seconds = time.monotonic() - begin
    return recording


def afina(*args: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """Return the command line of the ``afina`` script of this environment."""
    return [Path(sys.executable).with_name("afina"), *args]


def _type(process: subprocess.Popen[bytes], terminal: int | None, typed: str) -> None:
    if terminal is not None:
        if typed:
            os.write(terminal, typed.encode() + b"\x04")
        return
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(typed.encode())
        process.stdin.close()


def _read(recording: Recording, shown: int, apart: int | None, begin: float, timeout_seconds: float) -> None:
    """Read until the command and its children have let go of what they write to."""
    decoders = {shown: b"", **({apart: b""} if apart is not None else {})}
    while decoders:
        left = timeout_seconds - (time.monotonic() - begin)
        ready = select.select(list(decoders), [], [], max(0.0, left))[0]
        assert ready, f"ran past {timeout_seconds} s; it has shown\n{recording.raw[-4000:]}"
        for source in ready:
            try:
                read = os.read(source, 1 << 16)
            except OSError:  # a terminal's other end is closed
                read = b""
            if not read:
                del decoders[source]
                continue
            text, decoders[source] = _decode(decoders[source] + read)
            if source == shown:
                recording.chunks.append((time.monotonic() - begin, text))
            else:
                recording.stdout += text


def _decode(read: bytes) -> tuple[str, bytes]:
    """Return the text, and the bytes of a letter that has only begun."""
    for cut in range(4):
        with suppress(UnicodeDecodeError):
            return read[: len(read) - cut].decode(), read[len(read) - cut :]
    return read.decode(errors="replace"), b""
