"""The overview of a run's data, which the terminal and the page show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from trainer.data.prepare.finding import Finding
from trainer.data.sources.rows import RejectedRow
from trainer.files import read_json_lines
from trainer.html import visible
from trainer.view.pieces import Piece
from trainer.view.sharing import Sharing

MAX_LONG_ROWS = 5
OVERFLOW = 3.0  # rows over so many times the 95 % length share the last bar, or the others would be a few pixels
MAX_RAW_SHOWN = 400  # characters of a refused row
ROWS_A_REASON = 3
MAX_LINES_READ = 200_000  # lines of refused.jsonl that are looked through for them


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """One data set: what its files are called, the format of its rows, and what became of them."""

    names: tuple[str, ...]
    format: str
    rows: int
    refused: int
    dropped: int
    truncated: int
    refused_file: Path


@dataclass(frozen=True, slots=True)
class Bar:
    """Rows with ``begin <= tokens < end``; the last bar of a long tail has no end."""

    begin: int
    end: int | None
    rows: int

    @property
    def label(self) -> str:
        if self.end is None:
            return f"{self.begin:,} or more"
        return f"{self.begin:,}" if self.end == self.begin + 1 else f"{self.begin:,}–{self.end - 1:,}"


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example, token by token.

    Attributes:
        name: ``file:line``.
        held_out: it is no training row.
        why: what it was chosen for.
        tokens: of the example.
        loss_tokens: those of them that are in the loss; the first never is, since nothing predicts it.
        pieces: all its tokens.
    """

    name: str
    held_out: bool
    why: tuple[str, ...]
    tokens: int
    loss_tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that is shown.

    Attributes:
        model, tokenizer, template, train_on, packing, max_length: of the config.
        sources: the data sets, held-out files included.
        train_rows, held_out_rows: rows of each side.
        lengths: tokens of each training row, int32.
        label_tokens: of all training rows.
        longest: ``(file:line, tokens)`` of the longest training rows.
        sharing: ``None`` without training rows.
        findings: what is wrong with the data, worst first.
        refused: the first few refused rows of each reason.
        error: the line with which training would refuse this data, or ``None``.
        examples: some rows, token by token.
    """

    model: str
    tokenizer: str
    template: str
    train_on: str
    packing: str
    max_length: int
    sources: tuple[SourceSummary, ...]
    train_rows: int
    held_out_rows: int
    lengths: np.ndarray
    label_tokens: int
    longest: tuple[tuple[str, int], ...]
    sharing: Sharing | None
    findings: tuple[Finding, ...]
    refused: tuple[RejectedRow, ...]
    error: str | None
    examples: tuple[ShownExample, ...] = ()

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def loss_share(self) -> float:
        return self.label_tokens / max(1, self.tokens)

    @property
    def quantiles(self) -> tuple[int, int, int, int]:
        """Tokens of the shortest, the median, the 95 % and the longest training row, rounded as in the run's log."""
        if not len(self.lengths):
            return (0, 0, 0, 0)
        low, median, high, top = (round(q) for q in np.quantile(self.lengths, (0, 0.5, 0.95, 1)).tolist())
        return low, median, high, top

    def total(self, what: str) -> int:
        """Sum up over the sources ``refused``, ``dropped`` or ``truncated``."""
        return sum(getattr(source, what) for source in self.sources)


def histogram(lengths: np.ndarray, most_bars: int) -> list[Bar]:
    """Count rows by length, in at most ``most_bars`` bars of equal, round width; a long tail is one bar of its own."""
    if not len(lengths):
        return []
    low, top = int(lengths.min()), int(lengths.max())
    high = int(np.quantile(lengths, 0.95, method="lower"))
    tail = top > OVERFLOW * high
    width = _round_width(((2 * high if tail else top) - low + 1) / (most_bars - 2))
    begin = low // width * width
    bars = ((2 * high if tail else top) - begin) // width + 1
    places = np.minimum((lengths - begin) // width, bars)
    counts = np.bincount(places, minlength=bars + tail)
    edges = [begin + i * width for i in range(bars + 1)]
    out = [Bar(edge, edge + width, int(n)) for edge, n in zip(edges[:bars], counts)]
    return [*out, Bar(edges[-1], None, int(counts[bars]))] if tail else out


def _round_width(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50 … that is at least ``least``."""
    power = 1
    while True:
        for width in (power, 2 * power, 5 * power):
            if width >= least:
                return width
        power *= 10


def sample_rejected(files: Sequence[Path]) -> tuple[RejectedRow, ...]:
    """Read the first few rows of each reason in some ``refused.jsonl``; a missing or broken file shows none."""
    kept: dict[str, list[RejectedRow]] = {}
    for record in islice((record for file in files for record in read_json_lines(file)), MAX_LINES_READ):
        texts = {key: visible(str(record.get(key, ""))) for key in ("where", "reason", "message")}
        raw = visible(str(record.get("raw", ""))[: MAX_RAW_SHOWN + 1])
        row = RejectedRow(**texts, raw=raw if len(raw) <= MAX_RAW_SHOWN else raw[:MAX_RAW_SHOWN] + "…")
        same_reason = kept.setdefault(row.reason, [])
        if len(same_reason) < ROWS_A_REASON:
            same_reason.append(row)
    return tuple(row for rows in kept.values() for row in rows)
