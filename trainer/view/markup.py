"""Write the sections of the page that need no JavaScript. Every text is escaped here, where it enters markup."""

from __future__ import annotations

from html import escape

from trainer.html import text
from trainer.view import words
from trainer.view.overview import Overview, histogram

BARS = 36
TICKS = 4
HEIGHT = 100  # of a bar in the units of its drawing, which is stretched to the width that there is


def subtitle(overview: Overview) -> str:
    formats = ", ".join(dict.fromkeys(source.format for source in overview.sources)) or "none"
    shown = [
        ("format", formats),
        ("template", overview.template),
        ("in the loss", words.IN_LOSS.get(overview.train_on, overview.train_on)),
        ("model", overview.model),
        ("vocabulary", overview.tokenizer),
    ]
    return "".join(f"<span>{name} <b>{text(value)}</b></span>" for name, value in shown)


def verdict(overview: Overview) -> str:
    """Say in one line whether this can be trained on."""
    if overview.error is not None:
        return f'<p class="verdict bad"><b>Training would refuse this data.</b> {text(overview.error)}</p>'
    worries = [f for f in overview.findings if f.level != "note"]
    if worries:
        kinds = text(", ".join(dict.fromkeys(f.kind.replace("_", " ") for f in worries)))
        return f'<p class="verdict warn"><b>Can be trained on.</b> Look at: {kinds}.</p>'
    return '<p class="verdict good"><b>Can be trained on.</b> Nothing was found wrong.</p>'


def tiles(overview: Overview) -> str:
    low, median, high, top = overview.quantiles
    lost = f"{overview.total('dropped'):,} left out, {overview.total('truncated'):,} cut"
    out = [
        ("training rows", f"{overview.train_rows:,}", f"{overview.held_out_rows:,} held out", ""),
        ("tokens", _short(overview.tokens), f"{words.percent(overview.loss_share)} in the loss", ""),
        ("tokens a row, median", f"{median:,}", f"{low:,} – {top:,}, 95 % ≤ {high:,}", ""),
    ]
    if sharing := overview.sharing:
        factor = sharing.useful_tokens / sharing.trie_tokens
        out.append(("steps", f"{sharing.steps:,}", f"of {words.count(sharing.examples, 'example')}", ""))
        out.append(("trie packing", f"{factor:.2f} ×", f"{words.percent(sharing.shared_share)} of tokens shared", ""))
    refused = overview.total("refused")
    out.append(("rows refused", f"{refused:,}", lost, "bad" if refused else ""))
    return "".join(
        f'<div class="tile {state}"><p>{name}</p><b>{value}</b><p>{more}</p></div>' for name, value, more, state in out
    )


def lengths(overview: Overview) -> str:
    if not len(overview.lengths):
        return "<p>There is no row to train on.</p>"
    low, median, high, top = overview.quantiles
    figures = [("min", low), ("median", median), ("95 %", high), ("max", top), ("limit", overview.max_length)]
    listed = "".join(f"<li>{name} <b>{value:,}</b></li>" for name, value in figures)
    in_loss = f"{overview.label_tokens:,} of {overview.tokens:,} tokens are in the loss"
    return (
        f'<ul class="figures">{listed}</ul><figure>{_plot(overview)}</figure>'
        f'<p class="small">Longest: {text(words.longest_line(overview))}. {in_loss}.</p>'
    )


def _plot(overview: Overview) -> str:
    bars = histogram(overview.lengths, BARS)
    most, wide = max(bar.rows for bar in bars), -(-len(bars) // TICKS) * TICKS * 10
    drawn = []
    for i, bar in enumerate(bars):
        height = max(1.0, HEIGHT * bar.rows / most) if bar.rows else 0
        drawn.append(
            f'<rect x="{10 * i + 0.5}" y="{HEIGHT - height:.2f}" width="9" height="{height:.2f}">'
            f"<title>{bar.label} tokens: {words.count(bar.rows, 'row')}</title></rect>"
        )
    begin, last = bars[0].begin, bars[-1]
    width = (bars[0].end or begin + 1) - begin
    place = 10 * (overview.max_length - begin) / width
    limit = f"data.max_length = {overview.max_length:,}"
    if last.end is None and overview.max_length > last.begin:
        note = f"{limit} lies in the last bar."
    elif place <= wide:
        drawn.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="0" y2="{HEIGHT}"/>')
        note = f"The dashed line is {limit}."
    else:
        note = f"{limit} lies beyond the right edge."
    if last.end is None:
        note += f" The last bar holds all rows of {last.begin:,} tokens or more."
    ticks = [f"{begin + wide // 10 // TICKS * width * i:,}" for i in range(TICKS + 1)]
    axis = "".join(f"<span>{tick}</span>" for tick in [*ticks[:-1], "…" if last.end is None else ticks[-1]])
    return (
        f'<div class="plot"><svg viewBox="0 0 {wide} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="Rows by length in tokens">{"".join(drawn)}</svg></div><div class="axis" aria-hidden="true">{axis}'
        f"</div><figcaption>Rows by tokens. {note}</figcaption>"
    )


def sharing(overview: Overview) -> str:
    measured = overview.sharing
    if measured is None:
        return "<p>There is no step to measure.</p>"
    costs = [
        ("useful", "useful", measured.useful_tokens),
        ("in tries", "", measured.trie_tokens),
        ("padded", "", measured.padded_tokens),
    ]
    most = max(tokens for _, _, tokens in costs)
    rows = "".join(
        f'<span>{name}</span><svg class="{kind}" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{100 * tokens / most:.2f}" height="10"/></svg>'
        f"<b>{tokens / measured.rows * measured.examples:,.0f}</b>"
        for name, kind, tokens in costs
    )
    lines = "".join(f"<li><b>{name}</b>: {text(line)}.</li>" for name, line in words.sharing_lines(overview))
    return (
        f'<p class="small">Tokens a step, on one device</p><div class="cost">{rows}</div>'
        f'<ul class="plainlist small">{lines}<li>{text(words.packing_line(overview))}.</li></ul>'
    )


def findings(overview: Overview) -> str:
    if not overview.findings:
        return "<p>Nothing was found wrong: no duplicates, no row on both sides, no row refused.</p>"
    rows = "".join(
        f'<tr><td><span class="level {escape(f.level)}">{text(f.level.replace("_", " "))}</span></td>'
        f'<td class="what">{text(f.kind.replace("_", " "))}</td><td class="n">{f.count:,}</td>'
        f'<td class="text">{text(f.message)}</td>'
        f'<td class="where">{" ".join(f"<span>{text(w)}</span>" for w in f.where)}</td></tr>'
        for f in overview.findings
    )
    return _table(("level", "what", "rows", "message", "first"), rows)


def refused(overview: Overview) -> str:
    """Write the section with the refused rows; nothing when there are none."""
    if not overview.refused:
        return ""
    rows = "".join(
        f'<tr><td class="where">{text(r.where)}</td><td class="what">{text(r.reason.replace("_", " "))}</td>'
        f'<td class="text">{text(r.message)}</td><td class="raw">{text(r.raw)}</td></tr>'
        for r in overview.refused
    )
    files = dict.fromkeys(str(source.refused_file) for source in overview.sources if source.refused or source.dropped)
    every = "<br>".join(f"<code>{text(file)}</code>" for file in files)
    table = _table(("row", "why", "message", "its text"), rows)
    return f'<section class="card"><h2>Rows not used</h2>{table}<p class="small">All of them: {every}</p></section>'


def footer(overview: Overview) -> str:
    held = sum(example.held_out for example in overview.examples)
    shown = f"{len(overview.examples) - held:,} of {overview.train_rows:,} training rows"
    return f"This page holds {shown} and {held:,} of {overview.held_out_rows:,} held-out rows, and asks no network."


def _table(header: tuple[str, ...], rows: str) -> str:
    heads = "".join(f'<th scope="col"{" class=n" if name == "rows" else ""}>{name}</th>' for name in header)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _short(number: int) -> str:
    """Shorten a number to what fits a tile: ``170,100``, ``12.3 M``."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"
