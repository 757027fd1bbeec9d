"""Draw what runs logged over their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report import svg
from launch.report.gather import Report
from launch.report.runs import Run
from launch.report.words import name_of
from trainer.html import text

MAX_POINTS = 9000  # of all curves of a chart: what keeps a page small
MAX_TITLES = 400  # of the dots, for the same reason

Points = list[tuple[int, float | None]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with the sentence below it, and its legend as markup."""

    drawing: str
    caption: str
    legend: str = ""


def loss_curves(report: Report) -> list[Figure]:
    """Draw the loss of training (thin) and evaluations (marks) over the steps; the best runs coloured, the rest grey.

    Of several runs a second drawing has the evaluations of the second half, where they part.
    """
    runs = [pair for pair in placed(report) if pair[1].series("loss") or pair[1].series("eval_loss")]
    if not runs:
        return []
    if len(runs) == 1:
        drawn = _panel(runs, _Box(1080, 400))
        return [] if drawn is None else [Figure(drawn, _caption(report, [run for _, run in runs]))]
    whole = _panel(runs, _Box(540, 350))
    if whole is None:
        return []
    half = max((step for _, run in runs for step, _ in run.series("eval_loss")), default=0) / 2
    late = _panel(runs, _Box(540, 350), since=half) if half else None
    shown = [Figure(whole, _caption(report, [run for _, run in runs]))]
    return shown if late is None else [*shown, Figure(late, f"The evaluations alone, from step {half:g} on.")]


def placed(report: Report) -> list[tuple[int, Run]]:
    """Return each run with the place of its setting, from 0: the runs of a setting have its colour."""
    return [(place, run) for place, setting in enumerate(report.settings) for run in setting.runs]


@dataclass(frozen=True, slots=True)
class _Box:
    width: float
    height: float


def _panel(runs: Sequence[tuple[int, Run]], box: _Box, since: float | None = None) -> str | None:
    """Draw the curves; with ``since`` only the evaluations from that step on. Nothing where there is no number."""
    budget = max(40, MAX_POINTS // len(runs))
    train = [thinned(run.series("loss"), budget) if since is None else [] for _, run in runs]
    scored = [thinned([p for p in run.series("eval_loss") if p[0] >= (since or 0)], budget) for _, run in runs]
    values = [value for points in [*train, *scored] for _, value in points if value is not None]
    if not values:
        return None
    steps = [step for points in [*train, *scored] for step, _ in points]
    margin = 0.005 if since is None else 0.02
    x = svg.scale([0 if since is None else min(steps), max(steps)], 56, box.width - 12, margin=margin)
    y = svg.scale(values, box.height - 46, 30, log_from=6)
    name = "loss (nats a label token)" if since is None else "eval loss"
    drawn = svg.axes(x, y, "step (updates)", name + (", logarithmic" if y.is_log else ""))
    has_titles = sum(map(len, scored)) <= MAX_TITLES
    for number in reversed(range(len(runs))):  # the best on top
        place, run = runs[number]
        kind = f"c{place + 1}" if place < svg.COLOURED else "rest"
        drawn.append(svg.polyline(_through(train[number], x, y), f"line thin {kind}", run.name))
        drawn.append(svg.polyline(_through(scored[number], x, y), f"line {kind}", run.name))
        if place < svg.COLOURED or has_titles:
            drawn += _marks(run, place, scored[number], x, y)
        drawn += _skipped(run, x, y) if since is None else []
    words = "Loss" if since is None else "Evaluation loss of the second half"
    return svg.frame(box.width, box.height, drawn, f"{words} over steps, {len(runs)} runs")


def _marks(run: Run, place: int, points: Points, x: svg.Scale, y: svg.Scale) -> list[str]:
    coloured = place < svg.COLOURED
    shape, size = (svg.SHAPES[place], 3.6) if coloured else ("circle", 2.2)
    kind = f"dot c{place + 1}" if coloured else "dot rest"
    return [
        svg.marker(x(step), y(value), shape, size, kind, f"{run.name}, step {step}: eval loss {value:.4f}")
        for step, value in points
        if value is not None
    ]


def small(run: Run, key: str, name: str, divisor: float = 1) -> Figure | None:
    """Draw one logged figure of one run, small; nothing where it was not logged."""
    points = [(step, None if value is None else value / divisor) for step, value in thinned(run.series(key), 300)]
    values = [value for _, value in points if value is not None]
    if len(values) < 2:
        return None
    x = svg.scale([0, max(step for step, _ in points)], 56, 528, margin=0.005)
    y = svg.scale(values, 164, 26)
    drawn = [*svg.axes(x, y, "step", name), svg.polyline(_through(points, x, y), "line mid c1", name)]
    low, last = min(values), values[-1]
    caption = f"From {svg.short(low)} to {svg.short(max(values))}; {svg.short(last)} at the last step."
    return Figure(svg.frame(540, 206, drawn, f"{name} over steps"), caption)


def thinned(points: Points, most: int) -> Points:
    """Return at most about ``most`` points: of each stretch its least, its greatest and its gaps, so that no spike is
    lost."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept: Points = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        numbers = [(step, value) for step, value in stretch if value is not None]
        extremes = {min(numbers, key=lambda p: p[1]), max(numbers, key=lambda p: p[1])} if numbers else set()
        gap: Points = [(stretch[0][0], None)] if not numbers else []
        kept += [*sorted(extremes), *gap]
    return kept


def _through(points: Points, x: svg.Scale, y: svg.Scale) -> list[tuple[float, float] | None]:
    return [None if value is None else (x(step), y(value)) for step, value in points]


def _skipped(run: Run, x: svg.Scale, y: svg.Scale) -> list[str]:
    """Mark the steps whose updates were left out, and those whose loss was not finite."""
    left_out = [line["step"] for line in run.metrics if "skipped_steps" in line and "loss" not in line]
    broken = [step for step, value in run.series("loss") if value is None]
    marks = [(step, "update left out") for step in left_out] + [(step, "loss not finite") for step in broken]
    return [
        svg.marker(x(step), y.begin - 6, "up", 4, "fault", f"{run.name}, step {step}: {why}")
        for step, why in marks[:50]
    ]


def _caption(report: Report, runs: Sequence[Run]) -> str:
    parts = ["Thin: the loss of each update on its own batch. Marks: the loss on held-out rows."]
    if len(report.settings) > svg.COLOURED:
        parts.append(f"Coloured: the {svg.COLOURED} best by {report.metric.replace('_', ' ')}; grey: the rest.")
    if any(len(run.series("loss")) > max(40, MAX_POINTS // len(runs)) for run in runs):
        parts.append("Of each stretch of steps the least and the greatest are drawn.")
    if any(_has_faults(run) for run in runs):
        parts.append("Red triangles: updates left out, or a loss that is not finite.")
    return " ".join(parts)


def _has_faults(run: Run) -> bool:
    return any("skipped_steps" in line and "loss" not in line for line in run.metrics) or any(
        value is None for _, value in run.series("loss")
    )


def best_legend(report: Report) -> str:
    """Write which colour is which of the best settings; nothing for a single one."""
    names = []
    for setting in report.settings[: svg.COLOURED]:
        number = "" if setting.rank is None else f"#{setting.rank} "
        seeds = f" ({len(setting.runs)} {report.repeats})" if len(setting.runs) > 1 else ""
        names.append(f"{number}{name_of(report, setting)}{seeds}")
    return legend(names, len(report.settings) - svg.COLOURED) if len(report.settings) > 1 else ""


def legend(names: Sequence[str], others: int = 0) -> str:
    """Write the names of the coloured marks, best first, and how many are grey."""
    items = [
        f'<li><svg viewBox="0 0 26 12" aria-hidden="true"><path d="M0 6h26" class="line c{k + 1}"/>'
        f"{svg.marker(13, 6, svg.SHAPES[k], 4, f'dot c{k + 1}')}</svg>{text(name)}</li>"
        for k, name in enumerate(names)
    ]
    if others > 0:
        items.append(
            '<li><svg viewBox="0 0 26 12" aria-hidden="true"><path d="M0 6h26" class="line rest"/></svg>'
            f"{others} more</li>"
        )
    return f'<ul class="keys">{"".join(items)}</ul>'
