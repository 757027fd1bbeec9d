"""Draw what the result costs: quality against memory and against time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report import svg
from launch.report.curves import Figure, placed
from launch.report.gather import Report
from launch.report.ranking import is_lower_better, sortable
from launch.report.rows import GIB, score_text
from launch.report.runs import cost

WIDTH, HEIGHT = 540, 330
LETTER = 6.4  # width of a letter of a label, in the drawing's units


@dataclass(frozen=True, slots=True)
class Point:
    """A run by what it costs and what came out."""

    name: str
    x: float
    y: float
    place: int  # of its setting in the report, from 0
    label: str


def costs(report: Report) -> list[Figure]:
    """Draw the metric of each finished run against its peak memory and its time; nothing for fewer than two."""
    memory, time = [], []
    for place, run in placed(report):
        label = run.name if report.kind == "comparison" else f"#{report.settings[place].rank}"
        value, peak = run.score(report.metric), cost(run.metrics)["peak_memory_bytes"]
        if value is None or not run.is_finished:
            continue
        if peak is not None:
            memory.append(Point(run.name, peak / GIB, value, place, label))
        if run.seconds is not None:
            time.append(Point(run.name, run.seconds, value, place, label))
    drawn = []
    for points, name, form in (
        (memory, "peak memory (GiB)", "{:.2f} GiB"),
        (time, "time (seconds)", "{:,.0f} s"),
    ):
        if len(points) > 1:
            drawn.append(_scatter(report, points, name, form))
    return drawn


def _scatter(report: Report, points: Sequence[Point], x_name: str, form: str) -> Figure:
    is_lower, metric = is_lower_better(report.metric), report.metric.replace("_", " ")
    x = svg.scale([point.x for point in points], 56, WIDTH - 16, log_from=3, margin=0.08)
    # better is above, whatever the metric
    y = svg.scale(
        [point.y for point in points], *((30, HEIGHT - 46) if is_lower else (HEIGHT - 46, 30)), log_from=3, margin=0.1
    )
    above = metric + (" (better is up)" if is_lower else "") + (", logarithmic" if y.is_log else "")
    drawn = svg.axes(x, y, x_name + (", logarithmic" if x.is_log else ""), above)
    front = _front(points, report.metric)
    drawn.append(svg.polyline([(x(point.x), y(point.y)) for point in front], "front"))
    taken: list[tuple[float, float, float]] = []
    labelled = {point.place for point in front} | {point.place for point in points if point.place < svg.COLOURED}
    for point in sorted(points, key=lambda point: -point.place):
        coloured = point.place < svg.COLOURED
        kind = f"dot c{point.place + 1}" if coloured else "dot rest"
        shape = svg.SHAPES[point.place] if coloured else "circle"
        if coloured:
            taken.append((x(point.x) - 6, y(point.y) + 4, 12))
        title = f"{point.name}: {metric} {point.y:.4f}, {form.format(point.x)}"
        drawn.append(svg.marker(x(point.x), y(point.y), shape, 5.5 if coloured else 4, kind, title))
    for point in sorted(points, key=lambda point: point.place):
        if point.place in labelled or report.kind == "comparison":
            drawn.append(_name(point, x(point.x), y(point.y), taken))
    best = min(points, key=lambda point: sortable(point.y, report.metric))
    numbers = " Numbers are those of the ranking." if report.kind == "sweep" else ""
    caption = (
        f"Higher on the page is better. Best: {best.name} with {score_text(best.y)} at {form.format(best.x)}. "
        f"The line joins the runs that no other beats in both.{numbers}"
    )
    return Figure(svg.frame(WIDTH, HEIGHT, drawn, f"{metric} against {x_name}"), caption)


def _front(points: Sequence[Point], metric: str) -> list[Point]:
    """Return the points of which none other is both cheaper and better, by rising cost (the Pareto front)."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, sortable(p.y, metric))):
        if not front or sortable(point.y, metric) < sortable(front[-1].y, metric):
            front.append(point)
    return front


def _name(point: Point, x: float, y: float, taken: list[tuple[float, float, float]]) -> str:
    """Write a point's name beside it, where no other name is; nothing where there is no room."""
    words = point.label if len(point.label) <= 26 else point.label[:25] + "…"
    width = LETTER * len(words)
    for begin, at in ((x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 19)):
        is_inside = begin > 50 and begin + width < WIDTH - 2 and 24 < at < HEIGHT - 46
        if is_inside and all(abs(at - b) > 12 or begin > a + w or begin + width < a for a, b, w in taken):
            taken.append((begin, at, width))
            return svg.label(begin, at, words, "halo")
    return ""
