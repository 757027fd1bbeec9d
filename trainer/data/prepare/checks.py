"""Check the prepared rows before a GPU is asked for: duplicates, leakage, missing end tokens, one answer for all.

Everything is computed from columns of numbers that are there anyway, never from the rows' texts or tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainer.data.prepare.encode import (
    CONTROL,
    DOUBLE_BOS,
    FOREIGN,
    NO_END,
    SPLIT,
    TRUNCATED,
)
from trainer.data.prepare.finding import MAX_PLACES, Finding, count_rows, finding
from trainer.data.prepare.turn_checks import check_turns
from trainer.data.templates.template import Template

MIN_ROWS = 100
ONE_CLASS_SHARE = 0.9
SHORT_ANSWER_TOKENS = 32
NAMED_CONTROLS = 3
MUCH_LOST_SHARE = 0.1  # of all tokens, cut away
MIN_CLASS_ROWS = 20  # in fewer rows, one class for nearly all is chance


def check_table(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Check the usable rows of one table.

    Args:
        stats: dtype ``encode.ROW_STATS``, shape (rows,).
        row_name: row -> ``file:line``.
    """
    same, other = find_repeats(stats["prefix_hash"], stats["row_hash"], stats["reply_hash"])
    flags = stats["flags"]
    no_end, two_begins = ((flags & bit) > 0 for bit in (NO_END, DOUBLE_BOS))
    repeated, differs = "an earlier row is repeated, and so weighs more,", "the same prompt prefix had another answer"
    unended, stops = "no end token closes the answer, so the model does not learn to stop,", "fix the chat template"
    begins, one_begin = "two begin tokens stand at the start", "take one out of the chat template or of the rows"
    found = [
        *finding("duplicate", "warning", same, repeated, "remove them", row_name),
        *finding("other_answer", "warning", other, differs, "keep one of them", row_name),
        *finding("no_end_token", "warning", no_end, unended, f"{stops}, or data.template=alpaca", row_name),
        *finding("double_bos", "warning", two_begins, begins, one_begin, row_name),
    ]
    found += [*_check_lengths(stats, row_name), *check_turns(stats, row_name)]
    return found + _check_one_class(stats, row_name)


def check_controls(stats: np.ndarray, names: list[str], parse: bool, row_name: Callable[[int], str]) -> list[Finding]:
    """Say which rows hold control tokens in their text: where most do, they are rendered already.

    Args:
        stats: dtype ``encode.ROW_STATS``, shape (rows,).
        names: of the control tokens and turn markers that they hold.
        parse: whether control tokens are taken for genuine.
        row_name: row -> ``file:line``.
    """
    listed = ", ".join(names[:NAMED_CONTROLS]) + (" …" if len(names) > NAMED_CONTROLS else "")
    own, foreign = ((stats["flags"] & bit) > 0 for bit in (CONTROL, FOREIGN))
    if foreign.sum() * 2 > len(stats) and not own.any():
        what = f"turn markers ({listed}) stand in the text, and this tokenizer has no such tokens,"
        return finding("control_tokens", "warning", foreign, what, "give `messages`, or the model of these", row_name)
    what = f"control tokens ({listed}) stand in the text and are read as characters"
    if parse or not own.any():
        return []
    if own.sum() * 2 > len(stats):
        hint = "data.control_tokens=parse, if the rows are rendered already; else take them out"
        return finding("control_tokens", "warning", own, what, hint, row_name)
    return finding("control_tokens", "note", own, what, "take them out, if they are not meant as text", row_name)


def _check_lengths(stats: np.ndarray, row_name: Callable[[int], str]) -> list[Finding]:
    """Say what was cut away to fit ``data.max_length``, and what was made into pieces."""
    cut, pieces = ((stats["flags"] & bit) > 0 for bit in (TRUNCATED, SPLIT))
    lost = int(stats["lost"].sum(dtype=np.int64))
    share = lost / max(1, lost + int(stats["length"].sum(dtype=np.int64)))
    level = "warning" if share > MUCH_LOST_SHARE else "note"
    shorter = f"{lost:,} tokens ({share:.0%} of all) are cut away to fit data.max_length"
    longer = "raise it, or data.on_too_long=split, to keep them"
    found = finding("truncated", level, cut, shorter, longer, row_name)
    if pieces.any():
        rows = len(np.unique(stats[["file", "line"]][pieces]))
        made = f"{int(pieces.sum()):,} pieces are made of {count_rows(rows)} longer than data.max_length"
        where = tuple(
            row_name(int(row))
            for row in np.flatnonzero(pieces & (np.diff(stats["line"], prepend=-1) != 0))[:MAX_PLACES]
        )
        found.append(Finding("split", "note", rows, f"{made} → raise it for fewer", where))
    return found


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
    return finding("duplicate", "warning", elsewhere, what, hint, row_name)


def check_leakage(
    train_hashes: np.ndarray, held_out_hashes: np.ndarray, row_name: Callable[[int], str]
) -> list[Finding]:
    """Check held-out rows for prompts that are trained on as well, or that begin a conversation that is.

    Args:
        train_hashes, held_out_hashes: of the prompt prefixes, and of what else groups rows in the split; int64, shape
            (kinds, rows).
        row_name: held-out row -> ``file:line``.
    """
    leaked = np.zeros(held_out_hashes.shape[-1], dtype=bool)
    for train, held_out in zip(train_hashes, held_out_hashes, strict=True):
        leaked |= np.isin(held_out, train)
    what = "the prompt prefix of a held-out row is trained on, so the score is too good,"
    hint = "take them out of data.path or of data.validation"
    return finding("leak", "warning", leaked, what, hint, row_name)


def check_held_out(
    held_out: int, wanted: int, validation: int | float, group_by: str | None, groups: np.ndarray
) -> list[Finding]:
    """Warn where far fewer rows are held out than ``data.validation`` asks for, and say why.

    Args:
        held_out: rows that are held out.
        wanted: rows that it asks for.
        validation: its value.
        group_by: ``data.group_by``.
        groups: of all rows, int64, shape (rows,), equal for those that stay on one side.
    """
    if not validation or (wanted and held_out >= wanted / 2):
        return []
    rows = len(groups)
    asked = f"{held_out} rows are held out, where data.validation={validation} of {count_rows(rows)} asks for {wanted}"
    if not wanted:
        message = f"{asked} → a larger share, or a file of its own"
        return [Finding("few_held_out", "warning", rows, message, ())]
    largest = int(np.unique(groups, return_counts=True)[1].max())
    which = f"all {rows:,}" if largest == rows else f"up to {largest:,}"
    alike = f"have one value in {group_by}" if group_by else "begin with one prompt"
    why = f"{which} {alike}, and such rows stay on one side of the split"
    message = f"{asked}: {why} → data.group_by=COLUMN groups them by a column, row by none; or data.validation=FILE"
    return [Finding("few_held_out", "warning", rows, message, ())]


def check_begin_token(template: Template, parse: bool, rows: int) -> list[Finding]:
    """Say where a begin token was put that the template or the rows do not write, and where one is left out.

    Args:
        template: that the rows are written with.
        parse: whether rows may be rendered already.
        rows: how many there are.
    """
    token = template.tokenizer.bos_token
    wanted = f"this tokenizer puts {token} before a text"
    if template.adds_bos:
        message = f"{wanted}, and data.template writes none: it is put there, in the saved template too"
    elif not template.writes_bos():
        message = f"{wanted}, and its chat template writes none: there is none → data.template=FILE.jinja to have one"
    elif parse and template.bos_id is not None:
        message = f"{wanted}: it is put before rows that are rendered already and have none"
    else:
        return []
    return [Finding("begin_token", "note", rows, message, ())]


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
        out += finding("one_class", "warning", mask, what, "balance the answers", row_name)
    return out
