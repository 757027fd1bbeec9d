"""Write the sections of the page. Every text is escaped here or in ``svg``, where it enters markup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.report import curves, grids, rows, scatter, timeline
from launch.report.curves import Figure
from launch.report.gather import Report
from launch.report.log_file import Sample
from launch.report.rows import GIB, Cell, score_text
from launch.report.runs import Run, cost, number
from launch.report.values import MISSING, show
from trainer.html import text

MAX_VALUE = 300  # characters of a config's value
MAX_MATRIX = 12  # runs that stand side by side
MAX_ANSWERS = 8
MAX_EVENTS = 60


def card(heading: str, body: str, kind: str = "") -> str:
    """Write a section; nothing where it has no body."""
    return f'<section class="card {kind}"><h2>{text(heading)}</h2>{body}</section>' if body else ""


def figure(drawn: Figure | None) -> str:
    """Write a drawing with its legend and the sentence below it."""
    if drawn is None:
        return ""
    return f"<figure>{drawn.legend}{drawn.drawing}<figcaption>{text(drawn.caption)}</figcaption></figure>"


def tiles(report: Report) -> str:
    """Write the figures that are looked for first, of the best run."""
    run = report.runs[0]
    found = []
    for name in [each for each in report.scores if each != "train_loss" or each == report.metric][:2]:
        value, before = run.score(name), run.score_before(name)
        if value is not None:
            note = f"before training {score_text(before)}" if before is not None else "at the end"
            found.append((name.replace("_", " "), score_text(value), note))
    total, trained = (number(run.summary.get(f"{kind}_parameters")) for kind in ("total", "trainable"))
    if trained is not None:
        share = f"{100 * trained / total:.2f} % of {_millions(total)}" if total else ""
        found.append(("trained parameters", _millions(trained), share))
    spent = cost(run.metrics)
    if spent["peak_memory_bytes"] is not None:
        found.append(("peak memory", f"{spent['peak_memory_bytes'] / GIB:.2f} GiB", "of rank 0"))
    if spent["useful_tokens_per_second"] is not None:
        found.append(("useful tokens/s", f"{spent['useful_tokens_per_second']:,.0f}", "of its steps"))
    if run.seconds is not None:
        found.append(("time", f"{run.seconds:,.0f} s", f"{run.steps:,} steps" if run.steps is not None else ""))
    shown = "".join(
        f'<div class="tile"><p>{text(name)}</p><b>{text(value)}</b><p>{text(note)}</p></div>'
        for name, value, note in found
    )
    whose = f'<p class="small whose">The best run, {text(run.name)}:</p>' if report.kind != "run" else ""
    return f'{whose}<section class="tiles" aria-label="Figures">{shown}</section>' if shown else ""


def _millions(count: float) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def ranked_table(report: Report) -> str:
    """Write the ranked table; page.js makes its head sort it."""
    header, cells = rows.table(report)
    numeric = [any(row[k].is_number for row in cells) for k in range(len(header))]
    best = report.kind != "run" and report.settings[0].rank is not None
    kinds = [' class="best"' if best and k == 0 else "" for k in range(len(cells))]
    body = "".join(
        f"<tr{kind}>{''.join(map(_cell, row, numeric))}</tr>" for kind, row in zip(kinds, cells, strict=True)
    )
    figures = [each.replace("_", " ") for each in report.scores]
    note = "" if report.kind == "run" else f"Ranked by {figures[0]}."
    if report.has_repeats:
        note += f" Mean ± standard deviation over the {report.repeats} of a setting."
    if report.kind == "comparison":
        note += _base_note(report)
    if any(not setting.finished for setting in report.settings):
        note += " Of a run that did not finish, the last figures it logged."
    note += " Peak memory is that of rank 0's process (on a GPU: of its device)."
    return f'{_table(header, body, numeric, "ranked")}<p class="small">{text(note)}</p>{_problems(report)}'


def _base_note(report: Report) -> str:
    known = [(name.replace("_", " "), value) for name in report.scores if (value := report.before(name)) is not None]
    return f" Without training: {', '.join(f'{name} {score_text(value)}' for name, value in known)}." if known else ""


def _cell(cell: Cell, is_numeric: bool) -> str:
    kind = ' class="n"' if is_numeric else ""
    value = "" if cell.value is None else f' data-value="{text(cell.value)}"'
    return f"<td{kind}{value}>{text(cell.text)}</td>"


def _problems(report: Report) -> str:
    found = [(run.name, line) for run in report.runs for line in [*([run.error] if run.error else []), *run.notes]]
    found += [
        (run.name, f"eval loss of tries of learning rates: {_tries(run.tried)}") for run in report.runs if run.tried
    ]
    items = "".join(f"<li><b>{text(name)}</b>: {text(line)}</li>" for name, line in found)
    return f'<ul class="plainlist small">{items}</ul>' if items else ""


def _tries(tried: dict[str, Any]) -> str:
    return ", ".join(f"{rate} → {'failed' if number(loss) is None else f'{loss:.4f}'}" for rate, loss in tried.items())


def effects(report: Report) -> str:
    """Write what the varied keys do to the result."""
    return "".join(card(heading, figure(drawn), "beside") for heading, drawn in grids.effects(report))


def loss(report: Report) -> str:
    """Write the curves of the loss."""
    drawn = "".join(map(figure, curves.loss_curves(report)))
    if report.kind != "run" and drawn:
        drawn = f'{curves.best_legend(report)}<div class="pair">{drawn}</div>'
    return card("Loss", drawn)


def costs(report: Report) -> str:
    drawn = scatter.costs(report)
    return card("What it costs", f'<div class="pair">{"".join(map(figure, drawn))}</div>') if drawn else ""


def details(report: Report) -> str:
    """Write what a single run logged beside its loss."""
    if report.kind != "run":
        return ""
    run = report.runs[0]
    drawn = [
        curves.small(run, "grad_norm", "gradient norm"),
        curves.small(run, "learning_rate", "learning rate"),
        curves.small(run, "useful_tokens_per_second", "useful tokens/s"),
        curves.small(run, "peak_memory_bytes", "peak memory (GiB)", GIB),
    ]
    shown = "".join(figure(each) for each in drawn if each)
    return card("While it trained", f'<div class="pair">{shown}</div>' if shown else "")


def over_time(report: Report) -> str:
    """Write when runs were alive and what happened to them."""
    events = timeline.told(report.runs)
    several = len(report.runs) > 1
    lines = "".join(
        f"<tr><td>{_clock(report, event.time)}</td>{f'<td>{text(run.name)}</td>' if several else ''}"
        f'<td class="n">{MISSING if event.step is None else event.step}</td><td>{text(event.kind)}</td>'
        f'<td class="text">{text(event.text)}</td></tr>'
        for run, event in events[:MAX_EVENTS]
    )
    header = ["after", *(["run"] if several else []), "step", "what", "the log says"]
    table = _table(header, lines, [name == "step" for name in header]) if lines else ""
    if len(events) > MAX_EVENTS:
        table += f'<p class="small">{len(events) - MAX_EVENTS} more are in the logs.</p>'
    if not lines:
        table = '<p class="small">No restart, no fault and no warning.</p>'
    drawn = figure(timeline.timeline(report))
    return card("Runs over time: restarts and faults", drawn + table if drawn or lines else "")


def _clock(report: Report, time: float) -> str:
    begin = min(run.log.lives[0].begin for run in report.runs if run.log.lives)
    seconds = max(0, round(time - begin))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def settings(report: Report) -> str:
    """Write the config: of one run what is not the default, of several what differs between them."""
    if report.kind == "run":
        return _not_default(report.runs[0])
    runs = [run for run in report.runs if run.config]
    if len(runs) < 2 or not report.varied:
        return ""
    if len(runs) <= MAX_MATRIX:
        header = ["key", *(run.name for run in runs)]
        lines = [[key, *(_value(run.config.get(key)) for run in runs)] for key in report.varied]
    else:
        header = ["key", "values, and how many runs have them"]
        lines = [[key, _counted([_value(run.config.get(key)) for run in runs])] for key in report.varied]
    body = "".join(
        f'<tr><th scope="row">{text(line[0])}</th>{"".join(f"<td>{text(v)}</td>" for v in line[1:])}</tr>'
        for line in lines
    )
    note = f"{len(report.varied)} keys differ; all others are the same in all runs."
    table = _table(header, body, [False] * len(header), "config")
    return card("What differs in their configs", f'{table}<p class="small">{note}</p>')


def _counted(values: Sequence[str]) -> str:
    different = dict.fromkeys(values)
    return ", ".join(f"{value} ({values.count(value)})" for value in list(different)[:30])


def _not_default(run: Run) -> str:
    import trainer.config

    keys: list[trainer.config.Key] = trainer.config.keys()
    default = {key.name: key.default for key in keys}
    changed = {k: v for k, v in run.config.items() if k not in default or show(v) != show(default[k])}
    body = "".join(
        f'<tr><th scope="row">{text(key)}</th><td>{text(_value(value))}</td>'
        f"<td>{text(_value(default[key])) if key in default else MISSING}</td></tr>"
        for key, value in changed.items()
    )
    table = _table(["key", "value", "default"], body, [False] * 3, "config") if body else ""
    return card("Its config, where it is not the default", table)


def _value(value: Any) -> str:
    shown = show(value)
    return shown if len(shown) <= MAX_VALUE else f"{shown[:MAX_VALUE]}…"


def data(report: Report) -> str:
    """Write what it was trained on, and on what machine."""
    run = next((run for run in report.runs if run.log.facts), report.runs[0])
    lines = dict(run.log.facts)
    useful, computed = (
        sum(number(line.get(f"{kind}_tokens")) or 0 for line in run.metrics) for kind in ("useful", "computed")
    )
    if computed:
        shared = (
            f"{useful:,} useful tokens, {computed:,} computed: {useful / computed:.2f} × (shared prefixes, padding)"
        )
        lines["sharing"] = shared
    lines |= _machine(run)
    body = "".join(f"<dt>{text(name)}</dt><dd>{text(line)}</dd>" for name, line in lines.items())
    whose = f'<p class="small">Of {text(run.name)}.</p>' if len(report.runs) > 1 and body else ""
    return card("Data and machine", f"<dl>{body}</dl>{whose}" if body else "")


def _machine(run: Run) -> dict[str, str]:
    found, known = run.environment, {}
    devices = found.get("devices")
    if isinstance(devices, list) and devices:
        names = [str(device) for device in devices]
        known["devices"] = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    hosts = found.get("hosts")
    if isinstance(hosts, list):
        known["hosts"] = ", ".join(dict.fromkeys(map(str, hosts)))
    packages = found.get("packages")
    if isinstance(packages, dict):
        names = [name for name in ("afina", "torch", "deepspeed", "transformers", "peft") if name in packages]
        known["versions"] = ", ".join(
            [f"python {found.get('python')}", *(f"{name} {packages[name]}" for name in names)]
        )
    git = found.get("git")
    if isinstance(git, dict):
        known["commit"] = f"{git.get('commit')}{' with changes' if git.get('changed') else ''}"
    command = found.get("command")
    if isinstance(command, list):
        known["command"] = " ".join(map(str, command[1:]))[: MAX_VALUE * 2]
    return known


def samples(report: Report) -> str:
    """Write answers before and after training beside the reference; of a comparison, those of its methods."""
    runs = [run for run in report.runs if any(run.log.samples.values())]
    if not runs:
        return ""
    before = next((run.log.samples[0] for run in runs if 0 in run.log.samples), [])
    shown = runs[:MAX_ANSWERS] if report.kind == "comparison" else runs[:1]
    blocks = []
    for place, sample in enumerate(_last(shown[0]) or before):
        lines = [("reference", sample.reference, "ref")]
        lines += [
            ("before training", old.answer, "old") for old in before[place : place + 1] if old.prompt == sample.prompt
        ]
        said_by: dict[str, list[str]] = {}
        for run in shown:
            answers = _last(run)
            if place < len(answers) and answers[place].prompt == sample.prompt:
                name = run.name if report.kind == "comparison" else f"after, step {max(run.log.samples)}"
                said_by.setdefault(answers[place].answer, []).append(name)
        lines += [(", ".join(names), answer, "new") for answer, names in said_by.items()]
        said = "".join(f'<dt>{text(name)}</dt><dd class="{kind}">{text(words)}</dd>' for name, words, kind in lines)
        blocks.append(f'<article class="sample"><pre dir="auto">{text(sample.prompt)}</pre><dl>{said}</dl></article>')
    whose = f'<p class="small">Answers of {text(shown[0].name)}.</p>' if report.kind == "sweep" else ""
    return card("Answers to held-out rows", "".join(blocks) + whose)


def _last(run: Run) -> list[Sample]:
    later = [step for step in run.log.samples if step]
    return run.log.samples[max(later)] if later else []


def _table(header: Sequence[str], body: str, numeric: Sequence[bool], kind: str = "") -> str:
    heads = "".join(f'<th scope="col"{" class=n" if n else ""}>{text(name)}</th>' for name, n in zip(header, numeric))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="{kind}"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )
