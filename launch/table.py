"""Build tables from records: cells, on the terminal, as Markdown and as CSV.

On a terminal a table is drawn with rich; elsewhere it is plain aligned text, one row a line, for grep and logs.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import write_atomically

Record = dict[str, Any]
NONE = "-"
MAX_WORD = 24  # letters


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the records' values.
        head: what stands above it.
        form: format of numbers, such as ``.4f`` or ``,``; empty: whole numbers as they are, others at their shortest.
        unit: written behind a number, with its space.
        divisor: numbers are divided by it (bytes by 2**30 are GiB); 1 leaves whole numbers whole.
    """

    key: str
    head: str
    form: str = ""
    unit: str = ""
    divisor: int = 1

    def cell(self, record: Mapping[str, Any]) -> str:
        """Return a record's value as text: ``-`` where there is none."""
        value = record[self.key]
        if value is None:
            return NONE
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        form = self.form or ("g" if isinstance(value, float) else "")
        return f"{value if self.divisor == 1 else value / self.divisor:{form}}{self.unit}"


def cells(records: Sequence[Record], columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows as text."""
    return [column.head for column in columns], [[column.cell(record) for column in columns] for record in records]


def show_records(
    records: Sequence[Record], columns: Sequence[Column], style: Callable[[Record], str | None] = lambda _: None
) -> None:
    """Print a table on stdout; ``style`` gives a rich style for a row, used on a terminal only."""
    show(*cells(records, columns), [style(record) for record in records])


def write(stem: Path, records: Sequence[Record], columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
    """Write ``STEM.csv`` (every key of the records, raw values) and ``STEM.md`` (the table as people read it).

    Args:
        stem: path of both without the ending; missing folders above it are made.
        records: at least one; all have the same keys.
        columns: of the Markdown table.
        notes: list items below it: a sentence does not fit a column.
    """
    write_atomically(stem.with_name(f"{stem.name}.csv"), to_csv(records).encode())
    text = [markdown(*cells(records, columns)), *(["", *(f"- {note}" for note in notes)] if notes else [])]
    write_atomically(stem.with_name(f"{stem.name}.md"), ("\n".join(text) + "\n").encode())


def show(header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None] = ()) -> None:
    """Print a table of text on stdout.

    Args:
        header: the columns' names.
        rows: cells, each row as long as the header.
        styles: a rich style for each row, used on a terminal only; empty for none.
    """
    if not sys.stdout.isatty():
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        for line in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        sys.stdout.flush()  # what is logged next comes behind it, where both are one file
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, heads = Console(), [name.replace("_", " ") for name in header]
    fitted = _widths([[head, *(row[i] for row in rows)] for i, head in enumerate(heads)], console.width)
    if fitted is None:
        for row in rows:
            console.print(_in_words(header, row, console.width), markup=False, highlight=False, soft_wrap=True)
        return
    # folded, not cut: a folder's name that ends in … cannot be typed
    table = Table()
    for head, width in zip(heads, fitted, strict=True):
        table.add_column(escape(head), overflow="fold", width=width)
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[number] if styles else None)
    console.print(table)


def _widths(columns: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return each column's width, so that a table fits without a broken word; ``None``: there is no such. A word of
    more than ``MAX_WORD`` letters (a path) may be broken."""
    widths = [max(map(len, cells)) for cells in columns]
    least = [min(MAX_WORD, max((len(w) for cell in cells for w in cell.split()), default=1)) for cells in columns]
    while sum(widths) + 3 * len(widths) + 1 > available:
        widest = max(range(len(widths)), key=lambda i: widths[i] - least[i])
        if widths[widest] <= least[widest]:
            return None
        widths[widest] -= 1
    return widths


def _in_words(header: Sequence[str], row: Sequence[str], width: int) -> str:
    """Return a row of a table that is too wide for the terminal: ``rank 1, r 16, eval_loss 0.3625``."""
    text = ", ".join(f"{head} {cell}" for head, cell in zip(header, row, strict=True) if cell not in ("", NONE))
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return raw values as CSV under the keys of the first record; mappings are written as JSON."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(records[0]))
    writer.writeheader()
    for record in records:
        writer.writerow({k: json.dumps(v) if isinstance(v, Mapping) else v for k, v in record.items()})
    return stream.getvalue()
