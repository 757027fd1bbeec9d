"""Detect the format of a data set from the fields of a row, or suggest which columns to name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.dataset_spec import COLUMNS
from trainer.config.messages import as_typed, nearest
from trainer.data.formats.conversations import CONTENT_ALIASES, CONTENT_KEYS, ROLE_ALIASES, ROLE_KEYS
from trainer.data.formats.fields import RowFields
from trainer.data.formats.meaning import BOTH, PREFERENCE, preference_columns
from trainer.data.sources.rows import Row, RowError
from trainer.errors import DataError

# The fields that a row of a format must have, in the order in which formats are tried: rows of one often carry a field
# of a later one along (Alpaca's own file has `text`, UltraChat has `prompt` beside `messages`).
REQUIRED_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("conversations",), ("contents",)),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response"), ("user", "assistant")),
    "alpaca": (("instruction", "output"),),
    "multiple_choice": (("question", "options", "answer"),),
    "text": (("text",),),
}
# What others call these fields.
ALIASES = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("query", "question", "source"),
    "completion": ("answer", "output", "target", "reply", "chosen"),
    "instruction": ("question", "query", "prompt", "task", "sentence"),
    "output": ("response", "answer", "completion", "target", "label", "reply"),
    "question": ("query", "prompt"),
    "options": ("choices", "candidates"),
    "answer": ("label", "answer_idx", "correct", "gold", "target"),
    "text": ("content", "document", "body", "article"),
}


def detect_format(row: Row, format: str, columns: Mapping[str, str]) -> str:
    """Return the format of a row's fields: one of ``dataset_spec.FORMATS`` but ``auto``.

    Args:
        row: the first usable row of a data set.
        format: anything but ``auto`` is returned as it is, unless the row is preference data without its fields.
        columns: our field names -> the row's.

    Raises:
        DataError: ``auto``, and the fields fit no known format; says which fields each format needs. Or they are those
            of preference data; or a key of ``columns`` is no field of any format.
    """
    _check_columns(columns)
    fitting = fitting_format(row, columns)
    wanted = preference_columns(row.fields)
    if wanted and (fitting is None or format not in ("auto", fitting)):
        reason = f"are {PREFERENCE}, and training on {BOTH}"
        hint = f"to train on what was chosen: {as_typed('data.columns', wanted)}"
        meant = "chat" if "messages" in wanted else "alpaca" if "output" in wanted else "prompt_completion"
        hint += f" data.format={meant}" if format not in ("auto", meant) else ""
        raise DataError(row.where, value=f"fields {', '.join(sorted(row.fields))}", reason=reason, hint=hint)
    if format != "auto":
        return format
    if fitting is not None:
        return fitting
    known = (f"{name} needs {' or '.join(', '.join(n) for n in needs)}" for name, needs in REQUIRED_FIELDS.items())
    raise DataError(
        row.where,
        value=f"fields {', '.join(sorted(row.fields)) or 'none'}",
        reason=f"fit no known format: {'; '.join(known)}",
        hint=f"name your columns: {as_typed('data.columns', _suggest_columns(row, columns))}",
    )


def fitting_format(row: Row, columns: Mapping[str, str]) -> str | None:
    """Return the format whose fields a row has: that of which ``columns`` names most, else the first; rather one where
    none of them is null."""
    fields = RowFields(row, columns)
    for has in (fields.given, fields.has):
        fitting = {
            name: max(sum(field in columns for field in names) for names in needs if all(map(has, names)))
            for name, needs in REQUIRED_FIELDS.items()
            if any(all(map(has, names)) for names in needs)
        }
        if fitting:
            return max(fitting, key=lambda name: fitting[name])
    return None


def explain(error: RowError, row: Row, format: str, columns: Mapping[str, str]) -> RowError:
    """Return the error of a row that lacks a field; one that says so where the row is of another format."""
    if error.code != "missing_field":
        return error
    other = fitting_format(row, columns)
    if other in (None, format):
        return error
    reason = f"is a row of the format {other}, and this data set is taken for {format}"
    mixed = as_typed("data.path", [{"path": "FILES", "format": format}, {"path": "OTHERS", "format": other}])
    hint = f"data.format={other} if all rows are, else {mixed}"
    return RowError(f"format_{other}", row.where, reason=reason, hint=hint)


def _check_columns(columns: Mapping[str, str]) -> None:
    for key, column in columns.items():
        if key in COLUMNS:
            continue
        near = nearest(key, COLUMNS)
        hint = (
            f"did you mean {near}" if near else f"columns maps our names to yours: one of {', '.join(sorted(COLUMNS))}"
        )
        raise DataError(f"data.columns.{key}", value=column, reason="is no field of any format", hint=hint)


def _suggest_columns(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """Suggest ``{ours: theirs}`` for the format that the fields come nearest to."""
    best, most = {"instruction": "YOURS", "output": "YOURS"}, 0
    for needs in REQUIRED_FIELDS.values():
        for names in needs:
            found = {name: _likely_column(name, row, columns) for name in names}
            score = sum(theirs is not None for theirs in found.values())
            if score == len(names) and score > most and len(set(found.values())) == score:
                best, most = {ours: str(theirs) for ours, theirs in found.items() if ours != theirs}, score
    if best.keys() == {"messages"}:
        best |= _suggest_message_keys(row.fields.get(best["messages"]))
    return best


def _suggest_message_keys(messages: Any) -> dict[str, str]:
    """Suggest ``role`` and ``content`` for messages that call them otherwise."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict):
        return {}
    out = {}
    for ours, usual, aliases in (("role", ROLE_KEYS, ROLE_ALIASES), ("content", CONTENT_KEYS, CONTENT_ALIASES)):
        theirs = None if any(key in first for key in usual) else next((a for a in aliases if a in first), None)
        if theirs:
            out[ours] = theirs
    return out


def _likely_column(name: str, row: Row, columns: Mapping[str, str]) -> str | None:
    ours = columns.get(name, name)
    likely = (ours, *ALIASES.get(name, ()))
    by_lower = {field.lower(): field for field in row.fields}
    return next((by_lower[n.lower()] for n in likely if n.lower() in by_lower), nearest(ours, row.fields, cutoff=0.75))
