"""What is wrong with the data, found before anything is paid for.

All of it is computed from columns of numbers that are there anyway, never from the rows' texts or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from trainer.data.prepare.encode import DOUBLE_BOS, NO_END, TRUNCATED
from trainer.data.sources.rows import RejectedRow

SHOWN = 5  # places named in a finding
FEW_ROWS = 100
ONE_CLASS_SHARE = 0.9
SHORT_ANSWER_TOKENS = 32
ONE_CLASS_ROWS = 20  # in fewer rows, a class that rules them is chance

# What holds in so many rows.
REASONS = {
    "broken_json": "the line is not JSON",
    "not_an_object": "the line is JSON, but no object with fields",
    "not_utf8": "the bytes are not UTF-8",
    "empty_answer": "the answer is empty",
    "empty_prompt": "the prompt is empty",
    "null": "null stands where a text is needed",
    "wrong_type": "a field has the wrong type",
    "missing_field": "a field is missing",
    "lone_surrogate": "half a surrogate pair, which is no text, stands",
    "too_long": "the tokens are more than data.max_length",
    "empty_loss_mask": "no token is learnt",
    "bad_role": "a turn has an unknown role",
    "bad_turns": "the turns are in an order that no conversation has",
    "bad_options": "the answer names none of the options, or they cannot be numbered,",
    "bad_weight": "a weight is not 0 or 1",
    "template": "the chat template cannot write the turns",
    "control_token": "a control token stands where text is expected",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble.

    Attributes:
        kind: a short fixed word: ``empty_answer``, ``duplicate``, ``leak`` …
        level: ``refused`` (rows left out, counted against ``data.max_refused``), ``left_out`` (too long, under
            ``on_too_long=drop``), ``warning`` or ``note``.
        count: rows concerned.
        message: one sentence: what, and the cure.
        where: the first few, ``file:line``.
    """

    kind: str
    level: str
    count: int
    message: str
    where: tuple[str, ...]


class RejectedCount:
    """Refused rows by their reason, counted as they come."""

    def __init__(self, on_too_long: str) -> None:
        self._dropped = "too_long" if on_too_long == "drop" else None
        self._counts: dict[str, int] = {}
        self._where: dict[str, list[str]] = {}

    def add(self, rows: Iterable[RejectedRow]) -> None:
        """Count some more."""
        for row in rows:
            self._counts[row.reason] = self._counts.get(row.reason, 0) + 1
            where = self._where.setdefault(row.reason, [])
            if len(where) < SHOWN:
                where.append(row.where)

    @property
    def dropped(self) -> int:
        """Rows left out for their length, as ``on_too_long=drop`` asks."""
        return self._counts.get(self._dropped, 0) if self._dropped else 0

    @property
    def refused(self) -> int:
        """All others: those that count against ``data.max_refused``."""
        return sum(self._counts.values()) - self.dropped

    def findings(self) -> list[Finding]:
        """One a reason, the commonest first."""
        out = []
        for reason, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            what = f"{REASONS.get(reason, reason)} in {_rows(count)}"
            if reason == self._dropped:
                level, message = "left_out", f"{what}, which are left out → raise data.max_length to keep them"
            else:
                level, message = "refused", f"{what} → mend them, or allow for them with data.max_refused"
            out.append(Finding(reason, level, count, message, tuple(self._where[reason])))
        return out


def in_table(facts: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Findings in the usable rows of one table.

    Args:
        facts: dtype ``encode.FACTS``, shape (rows,).
        row_name: row -> ``file:line``.
    """
    same, other = repeats(facts["prompt_key"], facts["row_key"], facts["reply_key"])
    flags = facts["flags"]
    no_end, two_begins, cut = ((flags & bit) > 0 for bit in (NO_END, DOUBLE_BOS, TRUNCATED))
    repeated, differs = "an earlier row is repeated, and so learnt more often,", "the same opening had another answer"
    unended, stops = "no end token closes the answer, so the model does not learn to stop,", "mend the chat template"
    begins, one_begin = "two begin tokens stand at the start", "take one out of the chat template or of the rows"
    shorter, longer = "tokens are cut away to fit data.max_length", "raise it to keep them"
    found = [
        *_finding("duplicate", "warning", same, repeated, "remove them", row_name),
        *_finding("other_answer", "warning", other, differs, "keep one of them", row_name),
        *_finding("no_end_token", "warning", no_end, unended, f"{stops}, or data.template=alpaca", row_name),
        *_finding("double_bos", "warning", two_begins, begins, one_begin, row_name),
        *_finding("truncated", "note", cut, shorter, longer, row_name),
    ]
    return found + _one_class(facts, row_name)


def repeats(prompt_keys: np.ndarray, row_keys: np.ndarray, reply_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that repeat an earlier one, and rows whose first answer differs from that of the first row that opens alike.

    Args:
        prompt_keys: of what stands before the first learnt token, int64, shape (rows,).
        row_keys: of the whole row.
        reply_keys: of the first learnt turn: later ones answer what may have gone another way.

    Returns:
        Two masks of shape (rows,), disjoint.
    """
    rows = len(prompt_keys)
    if not rows:
        return np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
    _, first, group = np.unique(prompt_keys, return_index=True, return_inverse=True)
    order = np.lexsort((row_keys, prompt_keys))  # stable: equal rows stay in the order of the file
    follows = np.zeros(rows, dtype=bool)
    follows[order[1:]] = (np.diff(prompt_keys[order]) == 0) & (np.diff(row_keys[order]) == 0)
    return follows, (reply_keys != reply_keys[first[group]]) & ~follows


def across_parts(row_keys: np.ndarray, begins: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Rows that an earlier part of a mixture holds too.

    Args:
        row_keys: of all parts, int64, shape (rows,).
        begins: where each part begins, and where the last ends.
        row_name: row -> ``file:line``.
    """
    if len(begins) <= 2:
        return []
    _, first, group = np.unique(row_keys, return_index=True, return_inverse=True)
    rows = np.arange(len(row_keys))
    elsewhere = np.searchsorted(begins, rows, "right") != np.searchsorted(begins, first[group], "right")
    what, hint = "an earlier part of the mixture is repeated", "take them out, or give the parts other weights"
    return _finding("duplicate", "warning", elsewhere, what, hint, row_name)


def leak(train_keys: np.ndarray, held_keys: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Held-out rows of a file of their own whose opening is trained on as well.

    Args:
        train_keys, held_keys: prompt keys, int64.
        row_name: held-out row -> ``file:line``.
    """
    what = "the opening of a held-out row is trained on, so the score is too good,"
    hint = "take them out of data.path or of data.validation"
    return _finding("leak", "warning", np.isin(held_keys, train_keys), what, hint, row_name)


def few_rows(rows: int) -> list[Finding]:
    """A warning when there are fewer than 100 training rows."""
    if rows >= FEW_ROWS:
        return []
    message = f"the model may learn so few rows by heart: {rows} to train on → bring more"
    return [Finding("few_rows", "warning", rows, message, ())]


def _one_class(facts: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    out: list[Finding] = []
    for file in np.unique(facts["file"]):
        rows = np.flatnonzero(facts["file"] == file)
        if len(rows) < ONE_CLASS_ROWS or np.median(facts["answer_length"][rows]) > SHORT_ANSWER_TOKENS:
            continue
        values, counts = np.unique(facts["text_key"][rows], return_counts=True)
        if counts.max() <= ONE_CLASS_SHARE * len(rows):
            continue
        mask = np.zeros(len(facts), dtype=bool)
        mask[rows] = facts["text_key"][rows] == values[counts.argmax()]
        what = f"one and the same answer, of {len(rows):,} that a file has, stands"
        out += _finding("one_class", "warning", mask, what, "balance the answers", row_name)
    return out


def _finding(
    kind: str, level: str, mask: np.ndarray, what: str, hint: str, row_name: Callable[[int], str]
) -> list[Finding]:
    """What holds in the rows of a mask, if it holds in any."""
    rows = np.flatnonzero(mask)
    where = tuple(row_name(int(row)) for row in rows[:SHOWN])
    return [Finding(kind, level, len(rows), f"{what} in {_rows(len(rows))} → {hint}", where)] if len(rows) else []


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
