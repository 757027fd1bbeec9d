"""Parse what stands in a file of anybody's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is none, or nested deeper than Python recurses.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Read the JSON objects of a file, one a line; a line that is none is passed over, and so is a missing file."""
    try:
        lines = file.open(encoding="utf-8", errors="replace")
    except OSError:
        return
    with lines:
        for line in lines:
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
