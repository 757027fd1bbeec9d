"""Count, write and read back the rows that cannot be used: ``refused.jsonl`` and the findings about them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from trainer.config.dataset_spec import FORMATS
from trainer.data.prepare.finding import MAX_PLACES, Finding, count_rows
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
    "preference": "an answer may be a bad one (preference data)",
    "media": "there is more than text",
    "not_kept": "the column of data.columns.keep is false",
    **{f"format_{name}": f"the row is of the format {name}, and the data set of another," for name in FORMATS},
}
MAX_SHOWN_HINTS = 2
MAX_HINTS = 100  # different ones that are counted a reason; they may name what a row holds


def left_out_reasons(on_too_long: str) -> set[str]:
    """Return the reasons for which the config itself leaves rows out: they are not refused."""
    return {"not_kept", "too_long"} if on_too_long == "drop" else {"not_kept"}


class RejectionCounter:
    """Counts rejected rows by their reason, as they come.

    Args:
        on_too_long: ``data.on_too_long``.
        many_files: the rows are of several files, so say of which.
    """

    def __init__(self, on_too_long: str, many_files: bool = False) -> None:
        self._left_out = left_out_reasons(on_too_long)
        self._many_files = many_files
        self._counts: Counter[str] = Counter()
        self._files: dict[str, Counter[str]] = {}
        self._hints: dict[str, Counter[str]] = {}
        self._where: dict[str, list[str]] = {}

    def add(self, rows: Iterable[RejectedRow]) -> None:
        """Count some more rows."""
        for row in rows:
            self._counts[row.reason] += 1
            self._files.setdefault(row.reason, Counter())[row.where.rpartition(":")[0]] += 1
            hints = self._hints.setdefault(row.reason, Counter())
            if row.hint in hints or len(hints) < MAX_HINTS:
                hints[row.hint] += 1
            where = self._where.setdefault(row.reason, [])
            if len(where) < MAX_PLACES:
                where.append(row.where)

    @property
    def dropped(self) -> int:
        """Rows left out for their length, as ``on_too_long=drop`` asks."""
        return self._counts["too_long"] if "too_long" in self._left_out else 0

    @property
    def refused(self) -> int:
        """Those that count against ``data.max_refused``: all but what the config itself leaves out."""
        return sum(count for reason, count in self._counts.items() if reason not in self._left_out)

    def findings(self) -> list[Finding]:
        """Report one finding a reason, the commonest first."""
        out = []
        for reason, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            what = f"{MESSAGES.get(reason, reason)} in {count_rows(count)}{self._by_file(reason)}"
            if reason in self._left_out:
                cure = "raise data.max_length to keep them" if reason == "too_long" else "as data.columns.keep says"
                level, message = "left_out", f"{what}, which are left out → {cure}"
            else:
                (cure, _), *_ = self._hints[reason].most_common(1)
                cure = f"{cure or 'fix them'}; or data.max_refused={self.refused} trains without the refused rows"
                level, message = "refused", f"{what} → {cure}"
            out.append(Finding(reason, level, count, message, tuple(self._where[reason])))
        return out

    def _by_file(self, reason: str) -> str:
        files = self._files[reason].most_common()
        if not self._many_files:
            return ""
        more = f" and {len(files) - MAX_PLACES} more files" if len(files) > MAX_PLACES else ""
        return f" ({', '.join(f'{name}: {count:,}' for name, count in files[:MAX_PLACES])}{more})"


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
    message = row["message"].removesuffix(f" → {row['hint']}")
    return f"{row['where']} {message} ({row['reason']})"


def summarize_rows(rows: Iterable[dict[str, str]]) -> str:
    """Summarize some rejected rows, those that say the same once."""
    first = {(row["reason"], row["message"].partition(": ")[2] or row["message"]): row for row in reversed([*rows])}
    return "; ".join(map(summarize_rejected, reversed(first.values())))


def summarize_hints(rows: Iterable[dict[str, str]]) -> str:
    """Return the hints of some rejected rows, each once."""
    return "; ".join(list(dict.fromkeys(row["hint"] for row in rows if row["hint"]))[:MAX_SHOWN_HINTS])


def first_refused(file: Path, most: int, on_too_long: str) -> list[dict[str, str]]:
    """Read the first few rows of a ``refused.jsonl`` that count against ``data.max_refused``."""
    left_out = left_out_reasons(on_too_long)
    return list(islice((row for row in read_rejected(file) if row["reason"] not in left_out), most))
