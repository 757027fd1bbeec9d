"""The overview as text: drawn on a terminal, plain lines of any width in a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from trainer.view import words
from trainer.view.overview import Overview, Shown, histogram
from trainer.view.pieces import Piece, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BARS = 14
BAR_WIDTH = 40
MAX_STRETCH = 240  # tokens of one stretch of the mask: more than a screen of one row helps nobody
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
    """The lines for a pipe or a log: a fact a line, «learnt» stretches and ⟦control tokens⟧ marked."""
    for label, sentence in _facts(overview):
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
        yield "legend: «learnt», ⟦control token⟧"


def _draw(overview: Overview, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, sentence in _facts(overview):
        facts.add_row(label, Text(sentence))
    console.print(facts)
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
        console.print(Text("«learnt», ⟦control token⟧") if marks else _legend())


def _facts(overview: Overview) -> list[tuple[str, str]]:
    """``(label, sentence)`` of everything that is one sentence."""
    facts = [("data", words.rows_line(overview))]
    for source in overview.sources:
        facts.append(("from", f"{words.file_names(source)}: {words.count(source.rows, 'row')} as {source.format}"))
    facts.append(("template", words.template_line(overview)))
    facts.append(("tokenizer", overview.tokenizer))
    if lost := words.lost_line(overview):
        facts.append(("not used as is", lost))
    files = dict.fromkeys(s.refused_file for s in overview.sources if s.refused or s.dropped)
    facts += [("refused rows", visible(str(file))) for file in files]
    if overview.train_rows:
        facts.append(("tokens", words.tokens_line(overview)))
        facts.append(("a row", words.lengths_line(overview)))
        facts.append(("longest", words.longest_line(overview)))
        facts += words.sharing_lines(overview)
        facts.append(("packing", words.packing_line(overview)))
    return facts


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


def _heading(example: Shown) -> str:
    side = "held out" if example.held_out else "training"
    why = f" ({', '.join(example.why)})" if example.why else ""
    return f"{visible(example.name)} {side}{why}: {words.count(example.tokens, 'token')}, {example.learnt:,} learnt"


def _stretches(pieces: Iterable[Piece]) -> Iterator[tuple[bool, list[Piece | int]]]:
    """Runs of equal mask; an int stands for so many tokens that are not shown."""
    for learnt, run in groupby(pieces, key=lambda p: p.learnt):
        stretch = list(run)
        half = MAX_STRETCH // 2
        if len(stretch) <= MAX_STRETCH:
            yield learnt, [*stretch]
        else:
            yield learnt, [*stretch[:half], sum(len(p.ids) for p in stretch[half:-half]), *stretch[-half:]]


def _gap(tokens: int) -> str:
    return f"⟨… {tokens:,} tokens not shown, see --html …⟩"


def _marked(pieces: Sequence[Piece]) -> str:
    """The text with its mask in it, for where there are no colours."""
    out = []
    for learnt, stretch in _stretches(pieces):
        text = "".join(_gap(p) if isinstance(p, int) else f"⟦{p.text}⟧" if p.control else p.text for p in stretch)
        out.append(f"«{text}»" if learnt else text)
    return "".join(out)


def _coloured(pieces: Sequence[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for _, stretch in _stretches(pieces):
        for number, piece in enumerate(stretch):
            if isinstance(piece, int):
                text.append(_gap(piece), style="yellow")
            else:
                text.append(piece.text.replace("\n", "⏎\n").replace("\t", "⇥\t"), style=_style(piece, number))
    return text


def _style(piece: Piece, number: int) -> str:
    """Learnt tokens lie on green, in turn of two shades, so that one can be told from the next."""
    if not piece.learnt:
        return CONTROL if piece.control else ""
    return f"{'color(18)' if piece.control else 'color(16)'} on {GREENS[number % 2]}"


def _legend() -> Text:
    from rich.text import Text

    def sample(text: str, learnt: bool, control: bool, number: int = 0) -> tuple[str, str]:
        return text, _style(Piece(0, (), text, learnt, control), number)

    tokens = (sample(" learnt", True, False), sample(" tokens ", True, False, 1))
    controls = (sample("control token", False, True), "  ", sample(" learnt control token ", True, True))
    return Text.assemble("legend: ", *tokens, "  prompt  ", *controls)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _encodable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
