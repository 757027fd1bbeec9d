"""Say in a sentence or two what came out."""

from __future__ import annotations

from launch.report.gather import Report
from launch.report.ranking import Setting, short_labels, sortable
from launch.report.rows import GIB, score_text
from launch.report.runs import Run, cost
from launch.report.together import group_of, sentences
from launch.report.values import show
from trainer.html import visible

MAX_NAME = 60  # characters of a setting that is told by its values
NEAR = 0.05  # of the best figure: what is called near it


def kind(report: Report) -> str:
    """Return what the folder is called: one of runs that no sweep has made is no sweep."""
    is_sweep = report.kind != "sweep" or (report.folder / "sweep.csv").exists()
    return report.kind if is_sweep else "runs"


def title(report: Report) -> str:
    return f"{kind(report)} {visible(report.folder.resolve().name)}"


def name_of(report: Report, setting: Setting) -> str:
    """Return a setting as it is typed: ``r=16 alpha=32``; a run or a method by its name."""
    if report.kind != "sweep" or not report.axes:
        return visible(setting.runs[0].name)
    labels = short_labels(report.axes)
    typed = visible(" ".join(f"{labels[key]}={show(value)}" for key, value in setting.values.items()))
    return typed if len(typed) <= MAX_NAME else visible(setting.runs[0].name)


def result(report: Report) -> str:
    """Return what came out, in one sentence."""
    best = report.settings[0]
    if report.kind == "run":
        return _run_result(report, best.runs[0])
    spread = best.spread(report.metric)
    if best.rank is None:
        return f"No run is finished yet: {_counts(report)}."
    if spread is None:
        return f"No finished run has a score to rank it by: {_counts(report)}."
    before = report.before(report.metric)
    arrow = f"{score_text(before)} → " if before is not None else ""
    over = (
        f" (mean of {spread.count} {report.repeats}, ± {spread.deviation:.4f})" if spread.deviation is not None else ""
    )
    return f"Best: {name_of(report, best)}, {report.metric} {arrow}{score_text(spread.mean)}{over}."


def more(report: Report) -> list[str]:
    """Return what else to know of the result, a sentence each."""
    if report.kind == "run":
        return _run_more(report.runs[0])
    ranked = [setting for setting in report.settings if setting.spread(report.metric)]
    found = [f"{_counts(report)}."] if ranked else []
    if len(ranked) > 1:
        first, second = (setting.spread(report.metric) for setting in ranked[:2])
        assert first is not None
        assert second is not None
        gap = abs(second.mean - first.mean)
        line = f"Second is {name_of(report, ranked[1])} with {score_text(second.mean)}"
        noise = max((each.deviation or 0.0 for each in (first, second)), default=0.0)
        if noise and gap < noise:
            line += f", no further away than {report.repeats} of one setting are from each other"
        found.append(f"{line}.")
    if (cheap := _cheapest(report)) is not None:
        found.append(cheap)
    return [*found, *sentences((run.name, run.summary) for run in report.runs)]


def _run_result(report: Report, run: Run) -> str:
    steps = f"{run.steps:,} steps" if run.steps is not None else "no step"
    of = f" of {run.log.total_steps:,}" if run.log.total_steps and run.log.total_steps != run.steps else ""
    if run.status == "failed":
        return f"Failed after {steps}{of}: {visible(run.error or 'why is not known')}"
    parts = []
    for name in report.scores:
        value, before = run.score(name), run.score_before(name)
        if value is not None and (name != "train_loss" or report.metric == "train_loss"):
            parts.append(f"{name} {f'{score_text(before)} → ' if before is not None else ''}{score_text(value)}")
    scored = " and ".join(parts) or "no figure"
    time = f", {run.seconds:,.0f} s" if run.seconds else ""
    if run.is_finished:
        return f"Finished: {scored} after {steps}{of}{time}."
    return f"Not finished ({visible(run.status)}): {scored} after {steps}{of}{time}."


def _run_more(run: Run) -> list[str]:
    found = []
    if early := run.summary.get("stopped_early"):
        found.append(f"Stopped early: {visible(str(early))}.")
    if (best := run.summary.get("best_step")) is not None:
        found.append(f"It ends with the weights of step {best}, the best ones.")
    if skipped := run.summary.get("skipped_steps"):
        found.append(f"Updates left out because a loss or gradient was not finite: {skipped}.")
    if group_of(run.summary) is not None:
        found.append("One process trained it together with other trials of its sweep.")
    if len(run.log.lives) > 1:
        found.append(f"It was trained by {len(run.log.lives)} processes, one after the other.")
    return found


def _counts(report: Report) -> str:
    """Return how many runs there are, and how they stand."""
    statuses = [run.status for run in report.runs]
    finished = statuses.count("finished")
    noun = "methods" if report.kind == "comparison" else "runs"
    others = [f"{statuses.count(each)} {visible(each)}" for each in dict.fromkeys(statuses) if each != "finished"]
    return f"{finished} of {len(statuses)} {noun} finished" + (f", {', '.join(others)}" if others else "")


def _cheapest(report: Report) -> str | None:
    """Name the run of least memory whose figure is near the best one's, where that saves a tenth of the memory."""
    runs = [run for run in report.runs if run.is_finished and run.score(report.metric) is not None]
    peaks = {id(run): cost(run.metrics)["peak_memory_bytes"] for run in runs}
    if len(runs) < 2:
        return None
    best = min(runs, key=lambda run: sortable(run.score(report.metric), report.metric))
    peak = peaks[id(best)]
    near = [(each, run) for run in runs if (each := peaks[id(run)]) and _distance(run, best, report.metric) <= NEAR]
    if peak is None or not near:
        return None
    least, run = min(near, key=lambda pair: pair[0])
    if least > 0.9 * peak:
        return None
    far = 100 * _distance(run, best, report.metric)
    return f"{visible(run.name)} is {far:.1f} % behind with {least / GIB:.2f} GiB instead of {peak / GIB:.2f}."


def _distance(run: Run, best: Run, metric: str) -> float:
    """Return how far a run's figure is from the best one's, as a share of that."""
    value, least = run.score(metric), best.score(metric)
    assert value is not None
    assert least is not None
    return abs(value - least) / abs(least) if least else float("inf") if value else 0.0
