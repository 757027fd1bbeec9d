"""Check the prepared rows before a GPU is asked for: duplicates, leakage, missing end tokens, one answer for all.

Everything is computed from columns of numbers that are there anyway, never from the rows' texts or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.prepare.encode import ASKED_OTHERWISE, DOUBLE_BOS, NO_END, THINKS, TRUNCATED

MAX_PLACES = 5  # rows named in a finding
MIN_ROWS = 100
ONE_CLASS_SHARE = 0.9
SHORT_ANSWER_TOKENS = 32
MIN_CLASS_ROWS = 20  # in fewer rows, one class for nearly all is chance


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble in the data, and how many rows have it. A table's marker holds it as JSON.

    Attributes:
        kind: a short fixed word: ``empty_answer``, ``duplicate``, ``leak`` …
        level: ``refused`` (rows left out, counted against ``data.max_refused``), ``left_out`` (too long, under
            ``on_too_long=drop``), ``warning`` or ``note``.
        count: rows concerned.
        message: one sentence: the trouble, and a hint.
        where: the first few, ``file:line``.
    """

    kind: str
    level: str
    count: int
    message: str
    where: tuple[str, ...]


def check_table(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check the usable rows of one table.

    Args:
        stats: dtype ``encode.ROW_STATS``, shape (rows,).
        row_name: row -> ``file:line``.
    """
    same, other = find_repeats(stats["prefix_hash"], stats["row_hash"], stats["reply_hash"])
    flags = stats["flags"]
    no_end, two_begins, cut = ((flags & bit) > 0 for bit in (NO_END, DOUBLE_BOS, TRUNCATED))
    repeated, differs = "an earlier row is repeated, and so weighs more,", "the same prompt prefix had another answer"
    unended, stops = "no end token closes the answer, so the model does not learn to stop,", "fix the chat template"
    begins, one_begin = "two begin tokens stand at the start", "take one out of the chat template or of the rows"
    shorter, longer = "tokens are cut away to fit data.max_length", "raise it to keep them"
    found = [
        *_finding("duplicate", "warning", same, repeated, "remove them", row_name),
        *_finding("other_answer", "warning", other, differs, "keep one of them", row_name),
        *_finding("no_end_token", "warning", no_end, unended, f"{stops}, or data.template=alpaca", row_name),
        *_finding("double_bos", "warning", two_begins, begins, one_begin, row_name),
        *_finding("truncated", "note", cut, shorter, longer, row_name),
    ]
    return found + _check_turns(stats, row_name) + _check_one_class(stats, row_name)


def _check_turns(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check what the chat template makes of the turns: whether servers ask as was trained, where turns end, thoughts.

    In multiple turns one row may have one kind of trouble several times, so turns are counted too.
    """
    unended, lost = (int(stats[name].sum()) for name in ("unended", "lost_thoughts"))
    thinks = (stats["flags"] & THINKS) > 0
    silent = ~thinks if thinks.any() else np.zeros(len(stats), dtype=bool)
    asked = (stats["flags"] & ASKED_OTHERWISE) > 0
    otherwise = "answers do not begin where the template's generation prompt ends, so servers ask otherwise,"
    ask_alike = (
        "data.template_kwargs={enable_thinking: false} if the template reads it, data.train_on=last_assistant for "
        "earlier turns, or ask with what stands before the answers in `afina data`"
    )
    ends = "answers without an end token of their own (the next turn follows), after which the model does not stop,"
    stop = "data.train_on=last_assistant, or another chat template"
    drops = "thoughts of earlier turns, which the chat template drops, so those turns are trained without, stand"
    keep = "data.train_on=last_assistant, or a row a turn, to learn them"
    no_thought = "some rows have thoughts, and to answer without is taught"
    alike = "bring thoughts for all, or none, if the model is not to do both"
    return [
        *_finding("asked_otherwise", "warning", asked, otherwise, ask_alike, row_name),
        *_finding("unended_turn", "warning", stats["unended"] > 0, f"{unended:,} {ends}", stop, row_name),
        *_finding("lost_thoughts", "warning", stats["lost_thoughts"] > 0, f"{lost:,} {drops}", keep, row_name),
        *_finding("no_thoughts", "note", silent, no_thought, alike, row_name),
    ]


def check_template_kwargs(unread: Sequence[str]) -> list[Finding]:
    """Warn of names in ``data.template_kwargs`` that the template does not read."""
    if not unread:
        return []
    message = f"data.template_kwargs: the template reads no {', '.join(unread)} → take it out, or see its own names"
    return [Finding("template_kwargs", "warning", len(unread), message, ())]


def find_repeats(
    prefix_hashes: np.ndarray, row_hashes: np.ndarray, reply_hashes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find rows that repeat an earlier one, and rows whose first answer is another than that of the first row with the
    same prompt prefix.

    Args:
        prefix_hashes: of what stands before the first token in the loss, int64, shape (rows,).
        row_hashes: of the whole row.
        reply_hashes: of the first turn in the loss: later ones answer what may have gone another way.

    Returns:
        Two masks of shape (rows,), disjoint.
    """
    rows = len(prefix_hashes)
    if not rows:
        return np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
    _, first, group = np.unique(prefix_hashes, return_index=True, return_inverse=True)
    order = np.lexsort((row_hashes, prefix_hashes))  # stable: equal rows stay in the order of the file
    follows = np.zeros(rows, dtype=bool)
    follows[order[1:]] = (np.diff(prefix_hashes[order]) == 0) & (np.diff(row_hashes[order]) == 0)
    return follows, (reply_hashes != reply_hashes[first[group]]) & ~follows


def check_mixture(row_hashes: np.ndarray, starts: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check a mixture for rows that an earlier part of it holds too.

    Args:
        row_hashes: of all parts, int64, shape (rows,).
        starts: where each part begins, and where the last ends.
        row_name: row -> ``file:line``.
    """
    if len(starts) <= 2:
        return []
    _, first, group = np.unique(row_hashes, return_index=True, return_inverse=True)
    rows = np.arange(len(row_hashes))
    elsewhere = np.searchsorted(starts, rows, "right") != np.searchsorted(starts, first[group], "right")
    what, hint = "an earlier part of the mixture is repeated", "take them out, or give the parts other weights"
    return _finding("duplicate", "warning", elsewhere, what, hint, row_name)


def check_leakage(
    train_hashes: np.ndarray, held_out_hashes: np.ndarray, row_name: Callable[[int], str]
) -> list[Finding]:
    """Check held-out rows of a file of their own for prompt prefixes that are trained on as well.

    Args:
        train_hashes, held_out_hashes: of the prompt prefixes, int64.
        row_name: held-out row -> ``file:line``.
    """
    what = "the prompt prefix of a held-out row is trained on, so the score is too good,"
    hint = "take them out of data.path or of data.validation"
    return _finding("leak", "warning", np.isin(held_out_hashes, train_hashes), what, hint, row_name)


def check_row_count(rows: int) -> list[Finding]:
    """Warn of fewer than ``MIN_ROWS`` training rows."""
    if rows >= MIN_ROWS:
        return []
    message = f"the model may learn so few rows by heart: {rows} to train on → bring more"
    return [Finding("few_rows", "warning", rows, message, ())]


def _check_one_class(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check each file of short answers for one answer that nearly all its rows have."""
    out: list[Finding] = []
    for file in np.unique(stats["file"]):
        rows = np.flatnonzero(stats["file"] == file)
        if len(rows) < MIN_CLASS_ROWS or np.median(stats["answer_length"][rows]) > SHORT_ANSWER_TOKENS:
            continue
        values, counts = np.unique(stats["text_hash"][rows], return_counts=True)
        if counts.max() <= ONE_CLASS_SHARE * len(rows):
            continue
        mask = np.zeros(len(stats), dtype=bool)
        mask[rows] = stats["text_hash"][rows] == values[counts.argmax()]
        what = f"one and the same answer, of {len(rows):,} that a file has, stands"
        out += _finding("one_class", "warning", mask, what, "balance the answers", row_name)
    return out


def _finding(
    kind: str, level: str, mask: np.ndarray, what: str, hint: str, row_name: Callable[[int], str]
) -> list[Finding]:
    """Report what holds in the rows of a mask, if it holds in any."""
    rows = np.flatnonzero(mask)
    where = tuple(row_name(int(row)) for row in rows[:MAX_PLACES])
    return [Finding(kind, level, len(rows), f"{what} in {count_rows(len(rows))} → {hint}", where)] if len(rows) else []


def count_rows(count: int) -> str:
    """Return ``1 row``, ``2,000 rows``."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
