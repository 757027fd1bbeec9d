"""A table: drawn with rich on a terminal, plain aligned text elsewhere (one row a line, for grep and logs)."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None] = ()) -> None:
    """Print a table on stdout.

    Args:
        header: the columns' names.
        rows: cells, each row as long as the header.
        styles: a rich style for each row, used on a terminal only; empty for none.
    """
    if not sys.stdout.isatty():
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        for line in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # folded, not cut: a folder's name that ends in … cannot be typed
    table = Table()
    for name in header:
        table.add_column(escape(name), overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[number] if styles else None)
    Console().print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Raw values under the keys of the first record; all have the same."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
