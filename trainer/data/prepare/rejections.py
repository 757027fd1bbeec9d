"""Count, write and read back the rows that cannot be used: ``refused.jsonl`` and the findings about them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.prepare.checks import MAX_PLACES, Finding, count_rows
from trainer.data.sources.rows import RejectedRow

REJECTED_FILE = "refused.jsonl"
# What is said of the rows of a reason: it holds "in so many rows".
MESSAGES = {
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
    "empty_loss_mask": "no token is in the loss",
    "bad_role": "a turn has an unknown role",
    "bad_turns": "the turns are in an order that no conversation has",
    "bad_options": "the answer names none of the options, or they cannot be numbered,",
    "bad_weight": "a weight is not 0 or 1",
    "template": "the chat template cannot write the turns",
    "control_token": "a control token stands where text is expected",
}


class RejectionCounter:
    """Counts rejected rows by their reason, as they come."""

    def __init__(self, on_too_long: str) -> None:
        self._dropped = "too_long" if on_too_long == "drop" else None
        self._counts: dict[str, int] = {}
        self._where: dict[str, list[str]] = {}

    def add(self, rows: Iterable[RejectedRow]) -> None:
        """Count some more rows."""
        for row in rows:
            self._counts[row.reason] = self._counts.get(row.reason, 0) + 1
            where = self._where.setdefault(row.reason, [])
            if len(where) < MAX_PLACES:
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
        """Report one finding a reason, the commonest first."""
        out = []
        for reason, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            what = f"{MESSAGES.get(reason, reason)} in {count_rows(count)}"
            if reason == self._dropped:
                level, message = "left_out", f"{what}, which are left out → raise data.max_length to keep them"
            else:
                level, message = "refused", f"{what} → fix them, or allow for them with data.max_refused"
            out.append(Finding(reason, level, count, message, tuple(self._where[reason])))
        return out


def to_json_line(row: RejectedRow) -> bytes:
    """Serialize a rejected row as a line of ``refused.jsonl``."""
    # a lone surrogate is no UTF-8; escaped with a backslash it is the JSON that it came from
    return json.dumps(dataclasses.asdict(row), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_rejected(file: Path) -> Iterator[dict[str, str]]:
    """Read the rows of a ``refused.jsonl``, one by one."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def summarize_rejected(row: dict[str, str]) -> str:
    """Say in one line what is wrong with a rejected row: ``file:line``, the message without its hint, the reason."""
    return f"{row['where']} {row['message'].split(' → ')[0]} ({row['reason']})"


def first_refused(file: Path, most: int, on_too_long: str) -> list[str]:
    """Summarize the first few rows of a ``refused.jsonl`` that count against ``data.max_refused``."""
    out: list[str] = []
    for row in read_rejected(file):
        if len(out) == most:
            break
        if on_too_long != "drop" or row["reason"] != "too_long":
            out.append(summarize_rejected(row))
    return out
