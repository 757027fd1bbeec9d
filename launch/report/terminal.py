"""Print a report on stdout: the result in a sentence, then the ranked table."""

from __future__ import annotations

from launch import table
from launch.report import rows, words
from launch.report.gather import Report
from trainer.html import visible

COLOURS = {"failed": "red", "refused": "yellow", "running": "cyan"}


def show(report: Report) -> None:
    """Print the report; the best row and the failed ones are coloured on a terminal."""
    print(words.result(report))
    for sentence in words.more(report):
        print(sentence)
    header, cells = rows.table(report)
    styles: list[str | None] = []
    if report.kind != "run":
        best = report.settings[0]
        styles = ["bold green" if s is best and s.rank else COLOURS.get(s.runs[0].status) for s in report.settings]
    table.show(header, [[cell.text for cell in row] for row in cells], styles)
    for run in report.runs:
        for line in [*([run.error] if run.error and report.kind != "run" else []), *run.notes]:
            print(f"{visible(run.name)}: {' '.join(visible(line).split())}")
