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
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyte

from tests.helpers import warm
from tests.helpers.processes import stop_tree

ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:[34][0-8]|9[0-7]|10[0-7])[0-9;]*m")
QUIET_SECONDS = 0.3  # before a prompt is answered: it is shown before the command listens
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
    def text(self) -> str:
        """Return all that was shown, without escapes; every state of a bar is in it."""
        return ESCAPE.sub("", self.raw)

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
        text = self.text.replace("\r\n", "\n")
        return max(len(part) for line in text.split("\n") for part in line.split("\r"))


def record(
    command: Sequence[str | os.PathLike[str]],
    *,
    columns: int | None = 80,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    typed: str = "",
    prompt: str | None = None,
    stdout_apart: bool = False,
    timeout_seconds: float = 300,
) -> Recording:
    """Run a command to its end and record what it shows.

    Args:
        command: its words.
        columns: of the pseudo-terminal; ``None``: stdout and stderr are one pipe.
        env: laid over this process's environment; ``NO_COLOR`` and its like come from here alone.
        cwd: where it runs.
        typed: its stdin, to its end; on a terminal a line each time that ``prompt`` is shown, then Ctrl-D.
        prompt: what stands last on a terminal when a line may be typed.
        stdout_apart: stdout is a pipe, read into ``Recording.stdout``, and stderr alone is recorded.
        timeout_seconds: after them it is ended, and the test fails.
    """
    words = [os.fspath(word) for word in command]
    ours, theirs = _terminal(columns) if columns else os.pipe()
    apart = os.pipe() if stdout_apart else None
    begin = time.monotonic()
    process = subprocess.Popen(
        words,
        env=environment_of(env or {}),
        cwd=cwd,
        stdin=theirs if columns else subprocess.PIPE,
        stdout=apart[1] if apart else theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    if apart:
        os.close(apart[1])
    recording = Recording(columns=columns)
    lines = [*typed.splitlines(keepends=True), "\x04"] if prompt and columns else []

    def answer_prompt() -> None:
        if lines and recording.text.rstrip().endswith(str(prompt)):
            os.write(ours, (lines.pop(0) if len(lines) > 1 else lines[0]).encode())

    try:
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.write(typed.encode())
                process.stdin.close()
        _read(recording, ours, apart[0] if apart else None, begin, timeout_seconds, answer_prompt)
        recording.returncode = process.wait(max(1.0, timeout_seconds - (time.monotonic() - begin)))
    finally:
        stop_tree(process)
        os.close(ours)
        if apart:
            os.close(apart[0])
    recording.seconds = time.monotonic() - begin
    return recording


def _terminal(columns: int) -> tuple[int, int]:
    """Open a pseudo-terminal of 40 lines; return our end and the command's."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    return ours, theirs


def record_warm(
    *args: str | os.PathLike[str],
    columns: int | None = 80,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    timeout_seconds: float = 300,
) -> Recording:
    """Record ``afina`` as :func:`record` does, but ten seconds sooner: as a fork of a process that has imported
    everything (``tests.helpers.warm``), so what libraries' loading shows is not seen. Its stdin is empty."""
    recording = Recording(columns=columns)
    with tempfile.TemporaryDirectory() as folder:
        if columns:
            ours, theirs = _terminal(columns)
            output = os.ttyname(theirs)
        else:
            output = f"{folder}/pipe"
            os.mkfifo(output)
            ours = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
            theirs = os.open(output, os.O_WRONLY)
        begin = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            words, all_of_it = list(map(os.fspath, args)), {"OMP_NUM_THREADS": "1", **environment_of(env or {})}
            code = pool.submit(warm.run_into, output, words, all_of_it, cwd, timeout_seconds)
            code.add_done_callback(lambda _: os.close(theirs))  # then there is an end to be read
            _read(recording, ours, None, begin, timeout_seconds + 60, lambda: None)
        os.close(ours)
        recording.seconds = time.monotonic() - begin
    found = code.result()
    assert found is not None, f"ran past {timeout_seconds} s; it has shown\n{recording.raw[-4000:]}"
    recording.returncode = found
    return recording


def environment_of(env: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment as a user's shell has it, with ``env`` laid over it."""
    return {name: value for name, value in os.environ.items() if name not in UNSET} | {
        "TERM": "xterm-256color",
        **env,
    }


def afina(*args: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """Return the command line of the ``afina`` script of this environment."""
    return [Path(sys.executable).with_name("afina"), *args]


def _read(
    recording: Recording,
    shown: int,
    apart: int | None,
    begin: float,
    timeout_seconds: float,
    on_quiet: Callable[[], None],
) -> None:
    """Read until the command and its children have let go of what they write to."""
    decoders = {shown: b"", **({apart: b""} if apart is not None else {})}
    while decoders:
        left = timeout_seconds - (time.monotonic() - begin)
        assert left > 0, f"ran past {timeout_seconds} s; it has shown\n{recording.raw[-4000:]}"
        ready = select.select(list(decoders), [], [], QUIET_SECONDS)[0]
        if not ready:
            on_quiet()
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
