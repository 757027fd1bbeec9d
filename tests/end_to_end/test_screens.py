"""What each verb shows, line by line, beside screens that were looked at and approved (``screens/``).

Numbers, answers of the model and lines of progress are left out of the comparison. After a change that is wanted,
``AFINA_APPROVE=1 python -m pytest tests/end_to_end/test_screens.py`` writes the screens anew: read the difference.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.helpers.screen import Recording, afina, record, record_warm

SCREENS = Path(__file__).with_name("screens")
TINY = ("debug=tiny", "log.wandb=off")
FIRST = ("train", *TINY, "run.name=first")
SHORT = ("batch.max_steps=2", "eval.before=false")
VERBS = {
    "finished": FIRST,
    "eval": ("eval", "runs/first"),
    "runs": ("runs",),
    "show": ("show", "runs/first"),
    "data": ("data", "debug=tiny"),
    "sweep": ("sweep", *TINY, "method.r=2,4", *SHORT, "run.name=ranks"),
    "compare": ("compare", *TINY, "compare.methods=[lora,ia3]", "batch.max_steps=2", "run.name=methods"),
    "merge": ("merge", "runs/first", "--to", "merged"),
    "keys": ("config", "--keys", "learning"),
    "wrong_key": ("train", *TINY, "optim.learnin_rate=1e-4"),
}
PROGRESS = re.compile(
    r"(loading|verifying|starting|evaluating|generating|prepar(ing|ed)|comparing|folding|hashing|writing|measuring"
    r"|tiny is ready)\b"
)
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
# What one machine says and another does not: the time left, a time in minutes, a CPU's name, the letters of a curve.
UNLIKE = (
    (re.compile(r" eta \S+"), ""),
    (re.compile(r"(\d+ h )?(\d+ min )?\d+ (s|min)\b"), "0 s"),
    (re.compile(r"measured on [^)]*"), "measured"),
    (re.compile(r"(  answer +|sample \d+: ).*"), r"\1…"),
    (re.compile("[\u2800-\u28ff●┤─│]+"), "…"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recording]:
    folder = tmp_path_factory.mktemp("home")
    return folder, record_warm(*FIRST, columns=None, cwd=folder)


@pytest.fixture(scope="module")
def home(trained: tuple[Path, Recording]) -> Path:
    """A folder with a run in runs/first."""
    return trained[0]


def test_the_screen_of_a_training_is_the_approved_one(trained: tuple[Path, Recording]) -> None:
    home, shown = trained
    assert shown.returncode == 0, shown.text
    compare("train", lines_of(shown.text, home))


@pytest.mark.parametrize("verb", VERBS)
def test_a_screen_is_the_approved_one(verb: str, home: Path) -> None:
    shown = record_warm(*VERBS[verb], columns=None, cwd=home, timeout_seconds=600)
    assert shown.returncode == (2 if verb == "wrong_key" else 0), shown.text
    compare(verb, lines_of(shown.text, home))


@pytest.mark.slow
def test_a_conversation(home: Path) -> None:
    """Cold: what is typed has to come through a terminal or a pipe of its own."""
    shown = record(afina("chat", "runs/first"), columns=None, cwd=home, typed="hello\n/help\n/exit\n")
    assert shown.returncode == 0, shown.text
    lines = lines_of(shown.text, home)
    assert any("answering: first" in line for line in lines)
    assert any("/adapter NAME" in line for line in lines)


def compare(name: str, lines: list[str]) -> None:
    file = SCREENS / f"{name}.txt"
    if os.environ.get("AFINA_APPROVE"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == file.read_text(encoding="utf-8").split("\n")[:-1]


def lines_of(text: str, home: Path) -> list[str]:
    """Return the lines without what differs from machine to machine and from run to run."""
    found = []
    for line in text.replace(str(home), ".").replace("\r\n", "\n").split("\n"):
        for pattern, instead in UNLIKE:
            line = pattern.sub(instead, line)
        if line.strip(" …0123456789.") and not PROGRESS.match(line):
            found.append(re.sub(r" {2,}", "  ", NUMBER.sub("#", line)).rstrip())
    return found
