"""Print the overview as text: drawn on a terminal, plain lines of any width in a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from trainer.html import visible
from trainer.view import words
from trainer.view.overview import Overview, ShownExample, histogram
from trainer.view.pieces import Piece

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BARS = 14
BAR_WIDTH = 40
MAX_RUN = 240  # pieces of one run of the loss mask: more than a screen of one row helps nobody
GREENS = ("color(114)", "color(151)")
CONTROL = "cyan"
LEVEL_STYLES = {"refused": "bold red", "left_out": "red", "warning": "yellow", "note": ""}


def show(overview: Overview, console: Console | None = None) -> None:
    """Print the overview on stdout, or on a console of the caller's."""
    from rich.console import Console

    console = console or Console(highlight=False)
    if console.is_terminal:
        _draw(overview, console)
    else:
        print(_encodable("\n".join(plain(overview))), flush=True)


def plain(overview: Overview) -> Iterator[str]:
    """Write the lines for a pipe or a log: a fact a line, text «in the loss» and ⟦control tokens⟧ marked."""
    for label, sentence in _summary(overview):
        yield f"{label}: {sentence}"
    for bar in histogram(overview.lengths, BARS):
        yield f"lengths {bar.label}: {words.count(bar.rows, 'row')}"
    for finding in overview.findings:
        where = f" ({', '.join(map(visible, finding.where))})" if finding.where else ""
        yield _one_line(f"{finding.level} {finding.kind}: {visible(finding.message)}{where}")
    for row in overview.refused:
        yield _one_line(f"refused row: {row.where} {row.message} | {row.raw}")
    for example in overview.examples:
        yield f"example {_heading(example)}"
        yield from _marked(example.pieces).split("\n")
        yield ""
    if overview.examples:
        yield "legend: «in the loss», ⟦control token⟧"


def _draw(overview: Overview, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    summary = Table.grid(padding=(0, 2))
    summary.add_column(style="bold", no_wrap=True)
    summary.add_column(overflow="fold")
    for label, sentence in _summary(overview):
        summary.add_row(label, Text(sentence))
    console.print(summary)
    if len(overview.lengths):
        console.print(_bars(overview))
    if overview.findings:
        console.print(_findings(overview))
    if overview.refused:
        refused = Table("refused row", "why", "text", title="refused", title_justify="left", title_style="bold")
        for row in overview.refused:
            refused.add_row(Text(row.where), Text(row.reason, style="red"), Text(_one_line(row.raw)[:160]))
        console.print(refused)
    marks = console.no_color or console.color_system is None
    for example in overview.examples:
        console.print(Text("\n" + _heading(example), style="bold"))
        console.print(Text(_marked(example.pieces)) if marks else _coloured(example.pieces))
    if overview.examples:
        console.print()
        console.print(Text("«in the loss», ⟦control token⟧") if marks else _legend())


def _summary(overview: Overview) -> list[tuple[str, str]]:
    """Return ``(label, sentence)`` of everything that is one sentence."""
    lines = [("data", words.rows_line(overview))]
    for source in overview.sources:
        lines.append(("from", f"{words.file_names(source)}: {words.count(source.rows, 'row')} as {source.format}"))
    lines.append(("template", words.template_line(overview)))
    lines.append(("tokenizer", overview.tokenizer))
    if lost := words.lost_line(overview):
        lines.append(("not used as is", lost))
    files = dict.fromkeys(s.refused_file for s in overview.sources if s.refused or s.dropped)
    lines += [("refused rows", visible(str(file))) for file in files]
    if overview.train_rows:
        lines.append(("tokens", words.tokens_line(overview)))
        lines.append(("a row", words.lengths_line(overview)))
        lines.append(("longest", words.longest_line(overview)))
        lines += words.sharing_lines(overview)
        lines.append(("packing", words.packing_line(overview)))
    return lines


def _bars(overview: Overview) -> Text:
    from rich.text import Text

    bars = histogram(overview.lengths, BARS)
    most = max(bar.rows for bar in bars)
    wide = max(len(bar.label) for bar in bars)
    text = Text("\n")
    limit = overview.max_length
    for bar in bars:
        text.append(f"{bar.label:>{wide}} ", style="dim")
        text.append(("█" * round(BAR_WIDTH * bar.rows / most) or "▏") if bar.rows else "", style="blue")
        text.append(f" {bar.rows:,}")
        if bar.begin <= limit and (bar.end is None or limit < bar.end):
            text.append(f"  ← data.max_length={limit}", style="yellow")
        text.append("\n")
    return text


def _findings(overview: Overview) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table("level", "what", "rows", "message", "first", title="findings", title_justify="left")
    table.title_style = "bold"
    table.columns[2].justify = "right"
    table.columns[4].overflow = "fold"
    for finding in overview.findings:
        style = LEVEL_STYLES.get(finding.level, "")
        cells = (finding.level, finding.kind, f"{finding.count:,}", finding.message, ", ".join(finding.where))
        table.add_row(*(Text(visible(cell), style=style if i == 0 else "") for i, cell in enumerate(cells)))
    return table


def _heading(example: ShownExample) -> str:
    side = "held out" if example.held_out else "training"
    why = f" ({', '.join(example.why)})" if example.why else ""
    tokens = f"{words.count(example.tokens, 'token')}, {example.loss_tokens:,} in the loss"
    return f"{visible(example.name)} {side}{why}: {tokens}"


def _runs(pieces: Iterable[Piece]) -> Iterator[tuple[bool, list[Piece | int]]]:
    """Group pieces into runs of equal mask; an int stands for so many tokens that are not shown."""
    for in_loss, group in groupby(pieces, key=lambda p: p.in_loss):
        run = list(group)
        half = MAX_RUN // 2
        if len(run) <= MAX_RUN:
            yield in_loss, [*run]
        else:
            yield in_loss, [*run[:half], sum(len(p.ids) for p in run[half:-half]), *run[-half:]]


def _gap(tokens: int) -> str:
    return f"⟨… {tokens:,} tokens not shown, see --html …⟩"


def _marked(pieces: Sequence[Piece]) -> str:
    """Write the text with its loss mask in it, for where there are no colours."""
    out = []
    for in_loss, run in _runs(pieces):
        text = "".join(_gap(p) if isinstance(p, int) else f"⟦{p.text}⟧" if p.control else p.text for p in run)
        out.append(f"«{text}»" if in_loss else text)
    return "".join(out)


def _coloured(pieces: Sequence[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for _, run in _runs(pieces):
        for number, piece in enumerate(run):
            if isinstance(piece, int):
                text.append(_gap(piece), style="yellow")
            else:
                text.append(piece.text.replace("\n", "⏎\n").replace("\t", "⇥\t"), style=_style(piece, number))
    return text


def _style(piece: Piece, number: int) -> str:
    """Style a piece: tokens in the loss lie on two shades of green in turn, so that each has an edge."""
    if not piece.in_loss:
        return CONTROL if piece.control else ""
    return f"{'color(18)' if piece.control else 'color(16)'} on {GREENS[number % 2]}"


def _legend() -> Text:
    from rich.text import Text

    def sample(text: str, in_loss: bool, control: bool, number: int = 0) -> tuple[str, str]:
        return text, _style(Piece(0, (), text, in_loss, control), number)

    tokens = (sample(" tokens", True, False), sample(" in the loss ", True, False, 1))
    controls = (sample("control token", False, True), "  ", sample(" control token in the loss ", True, True))
    return Text.assemble("legend: ", *tokens, "  prompt  ", *controls)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _encodable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
