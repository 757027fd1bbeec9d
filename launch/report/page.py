"""Render a report as one HTML page that needs nothing but itself, and write it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from launch.report import sections, words
from launch.report.gather import Report
from trainer.config.messages import config_error
from trainer.files import write_atomically
from trainer.html import assemble, check_target, text


def render(report: Report) -> str:
    """Render the page. The same folder gives the same bytes."""
    state = "good" if report.settings[0].rank is not None else "warn"
    if report.kind == "run" and report.runs[0].status == "failed":
        state = "bad"
    more = text(" ".join(words.more(report)))
    many = report.kind != "run"
    parts = {
        "title": text(words.title(report)),
        "kind": text(words.kind(report)),
        "name": text(report.folder.resolve().name),
        "verdict": f'<p class="verdict {state}"><b>{text(words.result(report))}</b> {more}</p>',
        "tiles": sections.tiles(report),
        "ranked": sections.card("Ranking" if many else "Result", sections.ranked_table(report), "long"),
        "curves": sections.loss(report),
        "details": sections.details(report),
        "effects": sections.effects(report),
        "costs": sections.costs(report),
        "samples": sections.samples(report),
        "over_time": sections.over_time(report),
        "settings": sections.settings(report),
        "data": sections.data(report),
        "folder": text(report.folder),
    }
    return assemble("report", _asset("page.html"), parts, _asset("page.css"), _asset("page.js"))


def write(report: Report, path: Path, option: str = "--to") -> None:
    """Write the page: all of it or nothing, over a page that was there.

    Raises:
        ConfigError: it cannot be written there.
    """
    check_target(option, path)
    try:
        write_atomically(path.resolve(), render(report).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise config_error(option, path, f"cannot be written ({error.strerror})", "name another place") from error


def _asset(name: str) -> str:
    return files("launch.report").joinpath(name).read_text(encoding="utf-8")
