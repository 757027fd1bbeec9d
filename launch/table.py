"""A table: drawn with rich on a terminal, plain aligned text elsewhere (one row a line, for grep and logs)."""

from __future__ import annotations

import sys
from collections.abc import Sequence


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
