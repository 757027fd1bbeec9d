"""Say what is wrong with rows: one kind of trouble, how many have it, which are the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MAX_PLACES = 5  # rows named in a finding


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


def finding(
    kind: str, level: str, mask: np.ndarray, what: str, hint: str, row_name: Callable[[int], str]
) -> list[Finding]:
    """Report what holds in the rows of a mask, if it holds in any."""
    rows = np.flatnonzero(mask)
    where = tuple(row_name(int(row)) for row in rows[:MAX_PLACES])
    return [Finding(kind, level, len(rows), f"{what} in {count_rows(len(rows))} → {hint}", where)] if len(rows) else []


def count_rows(count: int) -> str:
    """Return ``1 row``, ``2,000 rows``."""
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
