"""Read and check the fields of a row one by one: text, type, presence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config.messages import as_typed
from trainer.data.sources.rows import Row, RowError


@dataclass(frozen=True, slots=True)
class RowFields:
    """Access to a row's fields by our names for them.

    Attributes:
        row: the row.
        columns: our field names -> the row's, where they differ.
        read: the row's fields that were asked for.
    """

    row: Row
    columns: Mapping[str, str]
    read: set[str] = field(default_factory=set)

    def where(self, name: str) -> str:
        """Return the place of a field, for messages: ``file:line field``, as the row calls it."""
        return f"{self.row.where} {self.columns.get(name, name)}"

    def has(self, name: str) -> bool:
        """Return whether the row has the field, null or not."""
        return self.columns.get(name, name) in self.row.fields

    def given(self, name: str) -> bool:
        """Return whether the row has the field, and it is not null."""
        return self.row.fields.get(self.columns.get(name, name)) is not None

    def first(self, *names: str) -> str:
        """Return the name of the first field that is given; else of the first that is there; else the first."""
        return next((n for n in names if self.given(n)), next((n for n in names if self.has(n)), names[0]))

    def unused(self) -> list[str]:
        """List the row's fields that hold something and were not asked for."""
        return [key for key, value in self.row.fields.items() if key not in self.read and not is_nothing(value)]

    def get(self, name: str) -> Any:
        """Return an optional field; ``None`` when it is null or not there.

        Raises:
            RowError: ``data.columns`` names a column for it and the row has no such column.
        """
        if name in self.columns and not self.has(name):
            raise self._missing(name)
        column = self.columns.get(name, name)
        self.read.add(column)
        return self.row.fields.get(column)

    def require(self, name: str) -> Any:
        """Return a field that must be there; it may be null, which the check of its type rejects.

        Raises:
            RowError: it is missing.
        """
        if not self.has(name):
            raise self._missing(name)
        return self.get(name)

    def text(self, name: str, empty: str) -> str:
        """Return a string that must be there and not be blank; ``empty`` is the code of the error when it is. A number
        is its text where ``data.columns`` names its column.

        Raises:
            RowError: it is none.
        """
        value = self.require(name)
        if isinstance(value, bool | int | float):
            if name in self.columns:
                return json.dumps(value)
            hint = f"quote it; or {as_typed('data.columns', {name: name})} takes numbers as text"
            raise wrong_type(self.where(name), value, "a string", hint)
        return require_text(self.where(name), value, empty)

    def optional_text(self, name: str) -> str:
        """Return an optional string; empty when it is null or missing."""
        value = self.get(name)
        return "" if value is None else require_text(self.where(name), value)

    def _missing(self, name: str) -> RowError:
        column = self.columns.get(name)
        if column is None:
            return RowError("missing_field", self.where(name), reason="is missing", hint=f"give the row `{name}`")
        reason = f"is missing, and data.columns.{name}={column} says that {name} is there"
        return RowError("missing_field", self.where(name), reason=reason, hint="fix data.columns, or the row")


def is_nothing(value: Any) -> bool:
    """Return whether a value says nothing: null, an empty text, list or mapping; 0 and false say something."""
    return value is None or (not value and isinstance(value, str | list | dict))


def require_text(where: str, value: Any, empty: str | None = None) -> str:
    """Check that ``value`` is a string that a tokenizer can take, and return it.

    Args:
        where: its place.
        value: what stands there.
        empty: the code with which to reject a string of nothing but white space; ``None`` lets it pass.

    Raises:
        RowError: ``null``, ``wrong_type``, ``lone_surrogate`` or ``empty``.
    """
    if not isinstance(value, str):
        hint = "make it one string" if isinstance(value, list | dict) else "quote it"
        raise wrong_type(where, value, "a string", hint)
    if empty and not value.strip():
        raise RowError(empty, where, reason="is empty: there is nothing to learn from", hint="remove the row")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"holds half a surrogate pair at {error.start}"
            raise RowError("lone_surrogate", where, reason=reason, hint="repair the \\u escape") from error
    return value


def wrong_type(where: str, value: Any, wanted: str, hint: str) -> RowError:
    """Build the error for a value of a wrong type: ``null`` or ``wrong_type``."""
    if value is None:
        return RowError("null", where, reason=f"is null, not {wanted}", hint="give it a value, or remove the row")
    shown = ascii(value)[:60]
    return RowError("wrong_type", where, value=shown, reason=f"is {type(value).__name__}, not {wanted}", hint=hint)


def strings_in(value: Any) -> Iterator[str]:
    """Iterate over every string inside lists and mappings, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)
