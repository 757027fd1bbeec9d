"""Draw what the varied keys do to the result: one key, two against each other, or all side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.report import svg
from launch.report.curves import Figure
from launch.report.gather import Report
from launch.report.ranking import Setting, is_lower_better, short_labels, sortable
from launch.report.rows import score_text
from launch.report.values import independent, ordered, show

RANK_AND_ALPHA = ("method.r", "method.alpha")
MAX_CELLS = 14  # of a side; more could not be read
MAX_LABEL = 22


def effects(report: Report) -> list[tuple[str, Figure]]:
    """Draw the figures that the number of varied keys asks for, each with its heading."""
    scored = [setting for setting in report.settings if setting.spread(report.metric)]
    axes = independent(report.axes, [setting.values for setting in report.settings])
    if len(scored) < 2 or not axes:
        return []
    labels = short_labels(report.axes)
    drawn: list[tuple[str, Figure]] = []
    if len(axes) == 1:
        drawn.append((f"{_metric(report)} by {labels[axes[0]]}", _one(report, scored, axes[0])))
    else:
        pair = RANK_AND_ALPHA if set(RANK_AND_ALPHA) <= set(axes) else tuple(axes[:2])
        heading = f"{labels[pair[1]]} × {labels[pair[0]]}" if pair != RANK_AND_ALPHA else "rank × alpha"
        figure = _heatmap(report, pair[0], pair[1], others=[key for key in axes if key not in pair])
        if figure is not None:
            drawn.append((heading, figure))
    if len(axes) > 2:
        drawn.append(("All varied keys", _parallel(report, scored, axes)))
    return drawn


def _metric(report: Report) -> str:
    return report.metric.replace("_", " ")


def _cut(words: str, most: int = MAX_LABEL) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _heatmap(report: Report, across: str, down: str, others: Sequence[str]) -> Figure | None:
    """Draw the metric by two keys: the best of a cell, written into it."""
    labels = short_labels(report.axes)
    columns = ordered([setting.values.get(across) for setting in report.settings])
    rows = ordered([setting.values.get(down) for setting in report.settings])
    if len(columns) > MAX_CELLS or len(rows) > MAX_CELLS:
        return None
    cells: dict[tuple[str, str], list[Setting]] = {}
    for setting in report.settings:
        cells.setdefault((show(setting.values.get(across)), show(setting.values.get(down))), []).append(setting)
    best = {at: min(found, key=lambda s: sortable(_mean(s, report), report.metric)) for at, found in cells.items()}
    shown = [value for setting in best.values() if (value := _mean(setting, report)) is not None]
    low, high = min(shown), max(shown)
    side, left, top = 104, 40 + 8 * max(len(_cut(show(row))) for row in rows), 24
    side = max(side, 12 + 7 * max(len(_cut(show(column))) for column in columns))
    drawn = []
    for i, column in enumerate(columns):
        drawn.append(svg.label(left + (i + 0.5) * side, top + 56 * len(rows) + 20, _cut(show(column)), anchor="middle"))
    for j, row in enumerate(reversed(rows)):
        y = top + 56 * j
        drawn.append(svg.label(left - 8, y + 32, _cut(show(row)), anchor="end"))
        for i, column in enumerate(columns):
            found = best.get((show(column), show(row)))
            drawn.append(_cell(report, found, left + i * side, y, side, (low, high)))
    width, height = left + side * len(columns) + 12, top + 56 * len(rows) + 44
    drawn.append(svg.label(left + side * len(columns) / 2, height - 4, labels[across], "name", "middle"))
    drawn.append(svg.label(4, 14, labels[down], "name"))
    caption = f"Each cell: {_metric(report)}, {'lower' if is_lower_better(report.metric) else 'higher'} is better"
    caption += "; bright is better, the best is framed, – was not run."
    if others:
        caption += (
            f" Of several runs in a cell the best one counts (they differ in {', '.join(labels[k] for k in others)})."
        )
    if report.has_repeats:
        caption += f" Cells with ± are means over {report.repeats}, with their standard deviation."
    return Figure(svg.frame(width, height, drawn, f"{_metric(report)} by {labels[across]} and {labels[down]}"), caption)


def _mean(setting: Setting, report: Report) -> float | None:
    found = setting.spread(report.metric)
    return found.mean if found else None


def _cell(report: Report, setting: Setting | None, x: float, y: float, side: float, span: tuple[float, float]) -> str:
    box = f'<rect x="{svg.n(x + 1)}" y="{svg.n(y + 1)}" width="{svg.n(side - 2)}" height="54" rx="3"'
    spread = setting.spread(report.metric) if setting else None
    if setting is None or spread is None:
        words = setting.runs[0].status if setting else "–"
        return f'{box} class="none"/>{svg.label(x + side / 2, y + 32, words, "soft", "middle")}'
    share = (spread.mean - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5
    fill, ink = svg.colour(1 - share if is_lower_better(report.metric) else share)
    is_best = ' class="best"' if setting.rank == 1 else ""
    several = spread.deviation is not None
    words = svg.label(x + side / 2, y + (25 if several else 32), score_text(spread.mean), f"cell {ink}", "middle")
    if spread.deviation is not None:
        words += svg.label(x + side / 2, y + 43, f"± {spread.deviation:.4f}", f"{ink}", "middle")
    title = f"<title>{svg.text(_title(setting, report))}</title>"
    return f'{box} fill="{fill}"{is_best}>{title}</rect>{words}'


def _title(setting: Setting, report: Report) -> str:
    labels = short_labels(report.axes)
    values = " ".join(f"{labels[key]}={show(value)}" for key, value in setting.values.items())
    found = setting.spread(report.metric)
    score = "no score" if found is None else f"{report.metric} {found.mean:.4f}"
    spread = (
        f" ± {found.deviation:.4f} over {found.count} {report.repeats}" if found and found.deviation is not None else ""
    )
    place = "" if setting.rank is None else f", rank {setting.rank}"
    return f"{values}: {score}{spread}{place}"


def _one(report: Report, scored: Sequence[Setting], key: str) -> Figure:
    """Draw the metric by one key: a mark a run, a line through the means."""
    values = ordered([setting.values.get(key) for setting in scored])
    place = {show(value): 56 + (i + 0.5) * (1012 / len(values)) for i, value in enumerate(values)}
    runs = [(setting, run.score(report.metric)) for setting in scored for run in setting.finished]
    y = svg.scale([value for _, value in runs if value is not None], 240, 28, margin=0.1)
    drawn = []
    for tick, words in zip(y.ticks(), svg.ticks_text(y.ticks())):
        drawn += [
            f'<path d="M56 {svg.n(y(tick))}H1068" class="grid"/>',
            svg.label(49, y(tick) + 4, words, anchor="end"),
        ]
    means = {show(setting.values.get(key)): _mean(setting, report) for setting in scored}
    line = [None if (mean := means[show(v)]) is None else (place[show(v)], y(mean)) for v in values]
    drawn.append(svg.polyline(line, "line c1"))
    for setting, value in runs:
        if value is not None:
            at = place[show(setting.values.get(key))]
            drawn.append(svg.marker(at, y(value), "circle", 4.5, "dot c1", _title(setting, report)))
    drawn += [svg.label(place[show(v)], 262, _cut(show(v)), anchor="middle") for v in values]
    drawn += [svg.label(562, 284, key, "name", "middle"), svg.label(14, 14, _metric(report), "name")]
    better = "lower" if is_lower_better(report.metric) else "higher"
    caption = f"A mark a run, {better} is better" + (
        f"; the line runs through the means over {report.repeats}." if report.has_repeats else "."
    )
    return Figure(svg.frame(1080, 292, drawn, f"{_metric(report)} by {key}"), caption)


def _parallel(report: Report, scored: Sequence[Setting], axes: Sequence[str]) -> Figure:
    """Draw a line a setting through its values of all keys, to its result (Inselberg, 1985)."""
    labels = short_labels(report.axes)
    width, top, bottom = 1080, 44, 300
    gap = (width - 200) / len(axes)
    room = min(MAX_LABEL, int(gap / 8))  # letters beside an axis
    places: list[dict[str, float]] = []
    drawn: list[str] = []
    for k, key in enumerate(axes):
        values = ordered([setting.values.get(key) for setting in scored])
        step = (bottom - top) / max(1, len(values) - 1)
        places.append(
            {show(v): bottom - i * step if len(values) > 1 else (top + bottom) / 2 for i, v in enumerate(values)}
        )
        x = 80 + k * gap
        drawn += [
            f'<path d="M{svg.n(x)} {top}V{bottom}" class="tick"/>',
            svg.label(x, 22, _cut(labels[key], room + 4), "name", "middle"),
        ]
    means = [mean for setting in scored if (mean := _mean(setting, report)) is not None]
    x_end, is_lower = 80 + len(axes) * gap, is_lower_better(report.metric)
    y = svg.scale(means, *((top, bottom) if is_lower else (bottom, top)), margin=0)
    drawn += [
        f'<path d="M{svg.n(x_end)} {top}V{bottom}" class="tick"/>',
        svg.label(x_end, 22, _metric(report), "name", "middle"),
    ]
    for value, at in ((min(means), top if is_lower else bottom), (max(means), bottom if is_lower else top)):
        drawn.append(svg.label(x_end + 8, at + 4, score_text(value)))
    for number, setting in reversed(list(enumerate(scored))):
        points: list[Any] = [(80 + k * gap, places[k][show(setting.values.get(key))]) for k, key in enumerate(axes)]
        mean = _mean(setting, report)
        if mean is not None:
            kind = f"line c{number + 1}" if number < svg.COLOURED else "line thin rest"
            drawn.append(svg.polyline([*points, (x_end, y(mean))], kind, _title(setting, report)))
    for k, place in enumerate(places):
        drawn += [svg.label(80 + k * gap - 7, at + 4, _cut(words, room), "halo", "end") for words, at in place.items()]
    caption = f"A line a setting: its values of the varied keys, then its {_metric(report)}, the best at the top. "
    caption += f"Coloured: the best {min(len(scored), svg.COLOURED)}."
    return Figure(svg.frame(width, 316, drawn, f"Settings and their {_metric(report)}"), caption)
