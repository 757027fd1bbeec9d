"""Record the screens of docs/first-hour.md: what a new user types in the first hour, and what afina shows then.

``python -m benchmarks.first_hour [FOLDER]`` runs every command in FOLDER (a temporary one by default) on a
pseudo-terminal of 100 columns, about 15 minutes on two cores, and writes the page.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.helpers.processes import ROOT
from tests.helpers.screen import Recording, afina, record

PAGE = ROOT / "docs" / "first-hour.md"
COLUMNS = 100
MAX_LINES = 44  # of a screen on the page: its beginning and its end
TIMEOUT_SECONDS = 3600
SMALL = "experiment=demo batch.max_steps=40 eval.max_rows=64 log=offline"


@dataclass(frozen=True, slots=True)
class Screen:
    """One command of the hour.

    Attributes:
        title: of its section.
        words: what the reader should see in it.
        command: as it is typed, without ``afina``.
        typed: what is typed while it runs.
        at: also show the screen as it stood after so many seconds.
    """

    title: str
    words: str
    command: str
    typed: str = ""
    at: float | None = None


HOUR = (
    Screen("Is this machine ready?", "What is missing is named with what to do about it.", "doctor"),
    Screen(
        "Which key was it?",
        "Keys by a word of their name or meaning, with default and limits.",
        "config --keys learning",
    ),
    Screen(
        "A mistake",
        "It costs a second, and the answer says what to type.",
        "train experiment=demo optim.learnin_rate=1e-4",
    ),
    Screen(
        "What is trained on",
        "Token by token, before any GPU is asked for; [data](data.md) says more.",
        "data experiment=demo",
    ),
    Screen(
        "Training",
        "A shorter run than `make demo`. Above the steps stands what is trained, on what and how; below them what came "
        "out, and what is typed next.",
        f"train {SMALL} run.name=first",
        at=25.0,
    ),
    Screen("The same again", "Nothing is redone, and nothing is loaded to say so.", f"train {SMALL} run.name=first"),
    Screen("What is there", "Runs, how they stand, how each goes on.", "runs"),
    Screen("A run by itself", "", "show runs/first"),
    Screen("Scores", "On the held-out rows, with the adapter that was trained.", "eval runs/first"),
    Screen(
        "An answer",
        "",
        'generate runs/first "Is this news headline sarcastic? Answer yes or no. local man wins argument with printer"',
    ),
    Screen("A conversation", "", "chat runs/first", typed="Are you a model?\n"),
    Screen(
        "A sweep",
        "Every combination a run; a ranked table, and a page to look at.",
        "sweep experiment=demo method.r=4,16 batch.max_steps=10 eval.before=false eval.max_rows=32 log=off",
    ),
    Screen(
        "Methods side by side",
        "",
        "compare experiment=demo 'compare.methods=[lora,ia3]' compare.rows=64 eval.max_rows=32 log=off",
    ),
    Screen(
        "A model for a server",
        "Written, read back, and compared with the live adapter.",
        "merge runs/first --to first-merged",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the hour and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=None, help="where the commands run")
    folder = parser.parse_args(arguments).folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    recorded = []
    for screen in HOUR:
        words = shlex.split(screen.command)
        shown = record(
            afina(*words),
            columns=COLUMNS,
            cwd=folder,
            typed=screen.typed,
            prompt="›" if screen.typed else None,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        print(f"{shown.seconds:6.1f} s, code {shown.returncode}: afina {screen.command[:70]!r}", flush=True)
        recorded.append((screen, shown))
    PAGE.write_text("\n".join(page(recorded, folder)), encoding="utf-8")


def page(recorded: Sequence[tuple[Screen, Recording]], folder: Path) -> list[str]:
    """Return the lines of the page."""
    lines = [
        "# The first hour",
        "",
        f"What a new user types, and what is shown: recorded on two CPU cores on {date.today()}, on a terminal of",
        f"{COLUMNS} columns, by `python -m benchmarks.first_hour`. Long screens are cut in the middle.",
        "",
    ]
    for screen, shown in recorded:
        lines += [f"## {screen.title}", *textwrap.wrap(screen.words, 119, break_on_hyphens=False), "", "```"]
        lines += [f"$ afina {screen.command}"]
        if screen.at is not None:
            lines += [
                *_cut(shown.screen_at(screen.at), folder),
                "```",
                f"…and after its {shown.seconds:.0f} s:",
                "",
                "```",
            ]
        lines += [*_cut(shown.screen(), folder), "```", ""]
    lines += ["## How long nothing was shown", "Seconds, on those two cores.", ""]
    lines += ["| command | first line | longest silence after it | whole |", "|---|---|---|---|"]
    for screen, shown in recorded:
        verb = screen.command.split()[0]
        times = f"{shown.first_line_seconds:.1f} | {shown.longest_silence_seconds:.1f} | {shown.seconds:.1f}"
        lines.append(f"| `afina {verb}` ({screen.title.lower().rstrip('?')}) | {times} |")
    return [*lines, ""]


def _cut(lines: Sequence[str], folder: Path) -> list[str]:
    """Return a screen's lines as the page has them: no paths of this machine, the middle of a long one left out."""
    plain = [
        line.replace(str(folder), ".").replace(str(ROOT), "afina").replace(str(Path.home()), "~") for line in lines
    ]
    if len(plain) <= MAX_LINES:
        return plain
    return [*plain[: MAX_LINES // 2], "…", *plain[-MAX_LINES // 2 :]]


if __name__ == "__main__":
    main()
