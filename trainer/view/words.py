"""Word the sentences that the terminal and the page share."""

from __future__ import annotations

from trainer.html import visible
from trainer.view.overview import Overview, SourceSummary

LEVELS = ("refused", "left_out", "warning", "note")
NAMES_SHOWN = 3
IN_LOSS = {  # of data.train_on
    "completion": "the answers",
    "assistant": "every assistant turn",
    "last_assistant": "the last assistant turn",
    "all": "every token",
}


def count(number: int, noun: str) -> str:
    """Count a noun: ``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """Write a share in two digits that count: ``4.2 %``, ``38 %``, ``0.07 %``; never 100 % of what is not all."""
    if share in (0, 1):
        return f"{share:.0%}".replace("%", " %")
    value = 100 * share
    if value >= 99.5:
        return f"{min(value, 99.99):.2f} %"
    return f"{value:.0f} %" if value >= 10 else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def file_names(source: SourceSummary) -> str:
    """Name the files of a source, the first few of many."""
    shown = ", ".join(visible(name) for name in source.names[:NAMES_SHOWN])
    more = len(source.names) - NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


def data_title(overview: Overview) -> str:
    """Name the data as a whole."""
    names = [file_names(source) for source in overview.sources]
    return names[0] + (f" + {len(names) - 1} more" if len(names) > 1 else "") if names else "no data"


def rows_line(overview: Overview) -> str:
    return f"{count(overview.train_rows, 'row')} to train on, {overview.held_out_rows:,} held out"


def lost_line(overview: Overview) -> str:
    """Say what became of the rows that are not used as they are; empty when all are."""
    fates = {"refused": "refused", "dropped": "left out as too long", "truncated": "cut to data.max_length"}
    return ", ".join(
        f"{count(overview.total(key), 'row')} {fate}" for key, fate in fates.items() if overview.total(key)
    )


def template_line(overview: Overview) -> str:
    return (
        f"{visible(overview.template)}; in the loss: {IN_LOSS.get(overview.train_on, overview.train_on)} "
        f"(data.train_on={overview.train_on})"
    )


def tokens_line(overview: Overview) -> str:
    return (
        f"{overview.tokens:,} in {count(overview.train_rows, 'row')}; "
        f"{overview.label_tokens:,} are in the loss ({percent(overview.loss_share)})"
    )


def lengths_line(overview: Overview) -> str:
    low, median, high, top = overview.quantiles
    return f"min {low:,}, median {median:,}, 95 % {high:,}, max {top:,}; data.max_length={overview.max_length}"


def longest_line(overview: Overview) -> str:
    return ", ".join(f"{visible(name)} ({tokens:,})" for name, tokens in overview.longest)


def sharing_lines(overview: Overview) -> list[tuple[str, str]]:
    """Return ``(label, sentence)`` on steps, tries and padding."""
    sharing = overview.sharing
    if sharing is None:
        return []
    sample = "all of them" if sharing.sampled == sharing.steps else f"{sharing.sampled} of them, evenly spread"
    return [
        (
            "steps",
            f"{sharing.steps:,} of {count(sharing.examples, 'example')}, about {sharing.useful_a_step:,.0f} useful "
            f"tokens each (measured on {sample}, one device)",
        ),
        (
            "packing=trie",
            f"{sharing.useful_tokens / sharing.trie_tokens:.2f} useful tokens for each computed one: "
            f"{percent(sharing.shared_share)} are in prefixes that another row of the forward has computed",
        ),
        (
            "packing=padded",
            f"{sharing.useful_tokens / sharing.padded_tokens:.2f} useful tokens for each computed one: "
            f"{percent(sharing.padding_share)} of the work is padding",
        ),
    ]


def packing_line(overview: Overview) -> str:
    """Say which of the two the run will use."""
    if overview.packing == "auto":
        return "batch.packing=auto: trie, once it is verified on the loaded model; else padded"
    return f"batch.packing={overview.packing}"
