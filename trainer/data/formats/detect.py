"""Detect the format of a data set from the fields of a row, or suggest which columns to name."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config.messages import as_typed, nearest
from trainer.data.formats.fields import RowFields
from trainer.data.sources.rows import Row
from trainer.errors import DataError

# The fields that a row of a format must have, in the order in which formats are tried: rows of one often carry a field
# of a later one along (Alpaca's own file has `text`, UltraChat has `prompt` beside `messages`).
REQUIRED_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("prompt", "response")),
    "alpaca": (("instruction", "output"),),
    "multiple_choice": (("question", "options", "answer"),),
    "text": (("text",),),
}
OPTIONAL_FIELDS = ("input", "system", "history", "tools")
# What others call these fields.
ALIASES = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("query", "question", "source"),
    "completion": ("answer", "output", "target", "reply"),
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
        format: anything but ``auto`` is returned as it is.
        columns: our field names -> the row's.

    Raises:
        DataError: ``auto``, and the fields fit no known format; says which fields each format needs. Or a key of
            ``columns`` is no field of any format.
    """
    _check_columns(columns)
    if format != "auto":
        return format
    fields = RowFields(row, columns)
    for name, needs in REQUIRED_FIELDS.items():
        if any(all(map(fields.has, names)) for names in needs):
            return name
    known = (f"{name} needs {' or '.join(', '.join(n) for n in needs)}" for name, needs in REQUIRED_FIELDS.items())
    raise DataError(
        row.where,
        value=f"fields {', '.join(sorted(row.fields)) or 'none'}",
        reason=f"fit no known format: {'; '.join(known)}",
        hint=f"name your columns: {as_typed('data.columns', _suggest_columns(row, columns))}",
    )


def _check_columns(columns: Mapping[str, str]) -> None:
    known = {name for needs in REQUIRED_FIELDS.values() for names in needs for name in names} | set(OPTIONAL_FIELDS)
    for key, column in columns.items():
        if key in known:
            continue
        near = nearest(key, known)
        hint = f"did you mean {near}" if near else f"columns maps our names to yours: one of {', '.join(sorted(known))}"
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
    return best


def _likely_column(name: str, row: Row, columns: Mapping[str, str]) -> str | None:
    ours = columns.get(name, name)
    likely = (ours, *ALIASES.get(name, ()))
    by_lower = {field.lower(): field for field in row.fields}
    return next((by_lower[n.lower()] for n in likely if n.lower() in by_lower), nearest(ours, row.fields, cutoff=0.75))
