"""README and the pages of docs/, as their tests read them: fenced blocks, the commands in them, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.processes import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "slurm/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
TESTED = "<!-- test -->"  # stands on the line before a block whose commands take seconds: a test runs them


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where its text begins (line, from 1), its language, its text, and whether a test runs it."""

    page: Path
    line: int
    language: str
    text: str
    is_tested: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found, inside, language, before = [], None, "", ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is None and line.startswith("```"):
            inside, language, is_tested = [], line[3:].strip(), before == TESTED
        elif inside is not None and line.startswith("```"):
            found.append(Block(page, number - len(inside), language, "\n".join(inside), is_tested))
            inside = None
        elif inside is not None:
            inside.append(line)
        before = line if line.strip() else before
    assert inside is None, f"{page}: a block does not end"
    return found


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The command lines in a page's bash blocks, split into words, each with its place."""
    out = []
    for block in blocks(page):
        if block.language == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            lines = [line.partition(" > ")[0] for line in lines]
            out += [(str(block), words) for line in lines if (words := shlex.split(line, comments=True))]
    return out


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def bare_brackets(text: str) -> list[str]:
    """Overrides whose brackets no quotes keep from the shell: bash would match files with them, zsh would stop."""
    return re.findall(r"[a-z_.]+=[\[{(]\S*", re.sub(r"'[^']*'|\"[^\"]*\"", "", text))


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that are in the project."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
