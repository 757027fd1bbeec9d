"""Refuse rows that mean something else than an example of what to say: preference data, pictures, sounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.messages import as_typed
from trainer.data.formats.conversations import MEDIA, holds_media
from trainer.data.formats.fields import RowFields, is_nothing, wrong_type
from trainer.data.sources.rows import RowError

GOOD_OR_BAD = ("label", "kto_tag", "is_chosen")  # columns of KTO's data: true for a good completion, else false
_TRUTH = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
PREFERENCE = "preference data: one answer is better than another"
BOTH = "all of them would teach the bad ones too"
_SUSPECTS = frozenset((*MEDIA, *GOOD_OR_BAD))
_NAMES_ANSWER = ("prompt_completion", "alpaca", "chat")


def check_meaning(fields: RowFields, format: str) -> None:
    """Check what stands beside the fields of a format.

    Raises:
        RowError: ``preference``, ``media``, or ``not_kept``: ``data.columns.keep`` names a column that is false.
    """
    if "keep" in fields.columns:
        _check_kept(fields)
    if format not in _NAMES_ANSWER:
        return
    mapped = set(fields.columns.values())
    for name, value in fields.row.fields.items():
        if name not in _SUSPECTS or name in mapped or is_nothing(value):
            continue
        if name in MEDIA:
            raise holds_media(f"{fields.row.where} {name}", name)
        if name in GOOD_OR_BAD and str(value).lower() in ("true", "false"):
            reason = f"is true or false for good and bad answers (KTO's preference data), and training on {BOTH}"
            hint = f"{as_typed('data.columns', {'keep': name})} trains on the good ones alone"
            where = f"{fields.row.where} {name}"
            raise RowError("preference", where, reason=reason, hint=hint)


def _check_kept(fields: RowFields) -> None:
    value, where = fields.require("keep"), fields.where("keep")
    kept = _TRUTH.get(value.lower() if isinstance(value, str) else value) if isinstance(value, str | int) else None
    if kept is None:
        raise wrong_type(where, value, "true or false", "data.columns.keep names a column of true and false")
    if not kept:
        raise RowError("not_kept", where, reason="is false, so the row is left out", hint="data.columns.keep says so")


def preference_columns(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the ``data.columns`` with which rows of ``chosen`` and ``rejected`` train on what is chosen; ``None``
    where they are no such rows."""
    if row.get("chosen") is None or "rejected" not in row:
        return None
    chosen = row["chosen"]
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    role = str(first.get("role", first.get("from"))).lower() if isinstance(first, dict) else "assistant"
    if role not in ("assistant", "gpt", "model"):
        return {"messages": "chosen"}
    if "prompt" in row:
        return {"completion": "chosen"}
    if "instruction" in row:
        return {"output": "chosen"}
    prompt = next((n for n in ("conversations", "messages", "question", "query", "input") if n in row), None)
    return {"prompt": prompt or "YOURS", "completion": "chosen"}
