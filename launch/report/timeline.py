"""Draw when runs were alive, and what happened to them."""

from __future__ import annotations

from collections.abc import Sequence

from launch.report import svg
from launch.report.curves import Figure
from launch.report.gather import Report
from launch.report.log_file import Event
from launch.report.runs import Run

WIDTH, ROW = 1080, 22
MAX_ROWS = 60
MAX_NAME = 30
LOOK = {
    "resumed": ("up", "c3"),
    "stopped": ("square", "c5"),
    "killed": ("diamond", "fault"),
    "failed": ("diamond", "fault"),
    "warning": ("down", "c2"),
    "finished": ("circle", "c1"),
}
UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (2 * 60, 60, "minutes"), (0, 1, "seconds"))


def timeline(report: Report) -> Figure | None:
    """Draw the lives of each run on one axis of time, with marks where something happened.

    From the times in `log.txt`; of a run without one, how long it took by its metrics.
    """
    runs = [run for run in report.runs if run.log.lives or run.seconds][:MAX_ROWS]
    if not runs:
        return None
    begin = min((run.log.lives[0].begin for run in runs if run.log.lives), default=0.0)
    end = max(
        [life.end for run in runs for life in run.log.lives]
        + [begin + (r.seconds or 0) for r in runs if not r.log.lives]
    )
    unit, name = next((size, words) for least, size, words in UNITS if end - begin >= least)
    left = 20 + 6.6 * max(min(len(run.name), MAX_NAME) for run in runs) if len(runs) > 1 else 24
    x = svg.Scale(0, max((end - begin) / unit, 1e-9) * 1.01, left, WIDTH - 20)
    height = 16 + ROW * len(runs)
    drawn = []
    for tick, words in zip(x.ticks(), svg.ticks_text(x.ticks())):
        drawn.append(f'<path d="M{svg.n(x(tick))} 8V{height}" class="grid"/>')
        drawn.append(svg.label(x(tick), height + 17, words, anchor="middle"))
    kinds: dict[str, None] = {}
    for place, run in enumerate(runs):
        y = 8 + ROW * (place + 0.5)
        if len(runs) > 1:
            drawn.append(svg.label(left - 9, y + 4, _cut(run.name), anchor="end"))
        drawn += _lives(run, y, x, begin, unit)
        for event in run.events:
            if event.kind in LOOK:
                kinds[event.kind] = None
                shape, kind = LOOK[event.kind]
                drawn.append(
                    svg.marker(x((event.time - begin) / unit), y, shape, 4.6, f"dot {kind}", words_of(run, event))
                )
    drawn.append(svg.label((left + WIDTH - 20) / 2, height + 36, f"{name} since the first start", "name", "middle"))
    caption = "A bar a process that trained the run; gaps are times in which none did."
    left_out = len(report.runs) - len(runs)
    caption += f" Runs without a log: {left_out}." if left_out > 0 else ""
    return Figure(svg.frame(WIDTH, height + 44, drawn, "Runs over time"), caption, _legend(list(kinds)))


def _lives(run: Run, y: float, x: svg.Scale, begin: float, unit: float) -> list[str]:
    spans = [(life.begin - begin, life.end - begin) for life in run.log.lives] or [(0.0, run.seconds or 0.0)]
    drawn = []
    for number, (start, end) in enumerate(spans, 1):
        a, b = x(start / unit), x(end / unit)
        title = f"{run.name}: process {number} of {len(spans)}, {end - start:,.0f} s"
        drawn.append(
            f'<rect x="{svg.n(a)}" y="{svg.n(y - 5)}" width="{svg.n(max(b - a, 1.5))}" height="10" rx="2" class="life">'
            f"<title>{svg.text(title)}</title></rect>"
        )
    return drawn


def _cut(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def words_of(run: Run, event: Event) -> str:
    """Return an event in one sentence."""
    after = "" if event.step is None else f" (step {event.step})"
    return f"{run.name}{after}: {event.text}"


def told(runs: Sequence[Run]) -> list[tuple[Run, Event]]:
    """Return the events that are worth a line: all but a plain end, in the order of time."""
    found = [(run, event) for run in runs for event in run.events if not event.text.startswith("finished ")]
    return sorted(found, key=lambda pair: pair[1].time)


def _legend(kinds: Sequence[str]) -> str:
    items = []
    for name in kinds:
        shape, kind = LOOK[name]
        mark = svg.marker(7, 6, shape, 4.6, f"dot {kind}")
        items.append(f'<li><svg viewBox="0 0 14 12" class="one" aria-hidden="true">{mark}</svg>{name}</li>')
    return f'<ul class="keys">{"".join(items)}</ul>'
