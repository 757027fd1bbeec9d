"""Show one run: what was trained on what, what came out, its curve, and what to type next."""

from __future__ import annotations

import shlex
import statistics
import time
from pathlib import Path

from launch.report.curves import loss_curves
from launch.report.gather import Report, gather
from launch.report.listing import SWEEP_FILES
from launch.report.next_steps import next_commands
from launch.report.rows import GIB, score_text
from launch.report.runs import SCORES, Run, cost, number
from launch.report.text_curve import Look, loss_curve
from launch.report.values import show as as_typed
from trainer.config.dataset_spec import parse_dataset_specs
from trainer.config.messages import config_error
from trainer.errors import AfinaError, CheckpointError
from trainer.files import write_atomically
from trainer.html import check_target, visible
from trainer.tracking.files import RUN_FILES
from trainer.tracking.result import duration, size_of

# What the drawing of a report takes from its page: a file of its own brings it along.
SVG_STYLE = """
svg{background:#fff;font-family:system-ui,sans-serif}text{font-size:12.5px;fill:#5a6372}.name{fill:#1b1f27;font-size:13px}
.grid{stroke:#e8eaef;fill:none}.tick{stroke:#a9b0bb;fill:none}.line{fill:none;stroke:#0072b2;stroke-width:2.2}
.line.thin{stroke-width:.8;opacity:.55}.dot{stroke:#fff;fill:#0072b2}.fault{fill:#a41e22}
"""


def is_shown(folder: Path) -> bool:
    """Return whether a folder is a run's, or one of runs."""
    return any((folder / name).is_file() for name in RUN_FILES) or is_sweep(folder)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds several runs, and is none itself."""
    if any((folder / name).is_file() for name in RUN_FILES):
        return False
    return any((folder / name).is_file() for name in SWEEP_FILES) or any(folder.glob("*/config.yaml"))


def read(folder: Path) -> Report:
    """Read the run in a folder.

    Raises:
        CheckpointError: it is a sweep or a comparison.
    """
    if is_sweep(folder):
        kind = "a comparison" if (folder / "compare.csv").is_file() else "several runs"
        hint = f"afina report {shlex.quote(str(folder))}, or show one of the folders in it"
        raise CheckpointError("run", value=folder, reason=f"is {kind}, not one run", hint=hint)
    return gather(folder)


def lines(report: Report, look: Look, now: float | None = None) -> list[str]:
    """Return what `afina show` prints.

    Args:
        report: of one run.
        look: of its curve.
        now: seconds since 1970, for how long ago it ended.
    """
    run = report.runs[0]
    facts = [(name, value) for name, value in _facts(run) if value]
    width = max(len(name) for name, _ in facts)
    curve = loss_curve(run, look)
    steps = next_commands(run)
    arrow = "→" if look.is_unicode else "->"
    return [
        f"{visible(str(run.folder))}: {_standing(run, now)}",
        *(f"  {name:<{width}}  {value}".replace("→", arrow) for name, value in facts),
        *(["", *curve] if curve else []),
        *(["", "next:", *(f"  {visible(step)}" for step in steps)] if steps else []),
    ]


def _standing(run: Run, now: float | None) -> str:
    total = run.log.total_steps
    of = f" of {total:,}" if total and total != run.steps else ""
    steps = f", {run.steps:,}{of} steps" if run.steps is not None else ", no step"
    life = run.log.lives[-1] if run.log.lives else None
    ago = "" if life is None else f", {age((time.time() if now is None else now) - life.end)} ago"
    return f"{visible(run.status)}{steps}{ago}"


def _facts(run: Run) -> list[tuple[str, str]]:
    """Return name and value of what there is to say, in the order of a run; an empty value is not shown."""
    found = [("error", _line(run.error)), *(("note", _line(note)) for note in run.notes)]
    found += [
        ("method", _method(run)),
        ("trained", _trained(run)),
        ("base", _typed(run, "model.name_or_path")),
        ("data", _data(run)),
    ]
    found += [(name, _score(run, name)) for name in SCORES if name != "eval_perplexity"]
    if early := run.summary.get("stopped_early"):
        found.append(("stopped early", _line(str(early))))
    if (best := run.summary.get("best_step")) is not None:
        found.append(("weights", f"of step {best}, the best ones"))
    if skipped := run.summary.get("skipped_steps"):
        found.append(("updates left out", f"{skipped}, their loss or gradient was not finite"))
    return [*found, ("time", _time(run)), ("speed", _speed(run)), ("memory", _memory(run)), *_saved(run)]


def _line(text: str | None) -> str:
    return " ".join(visible(text).split()) if text else ""


def _typed(run: Run, key: str) -> str:
    return visible(as_typed(run.config[key])) if run.config.get(key) is not None else ""


def _method(run: Run) -> str:
    parts = [_typed(run, "method.name")]
    for key, name in (("method.r", "r"), ("method.alpha", "alpha"), ("optim.learning_rate", "learning rate")):
        parts += [f"{name} {_typed(run, key)}"] if run.config.get(key) is not None else []
    bits = run.config.get("method.bits")
    parts += [f"base in {bits} bits"] if bits in (4, 8) else []
    return ", ".join(filter(None, parts))


def _trained(run: Run) -> str:
    trained, total = (number(run.summary.get(f"{kind}_parameters")) for kind in ("trainable", "total"))
    return f"{trained:,.0f} of {total:,.0f} parameters" if trained and total else ""


def _data(run: Run) -> str:
    try:
        specs = parse_dataset_specs(run.config.get("data.path"), "auto", {}, "train", None, None)
    except AfinaError:
        return ""
    names = ", ".join(visible(Path(spec.path).name) for spec in specs)
    rows = run.log.facts.get("data", "").partition(", from ")[0]
    return f"{names} ({visible(rows)})" if rows else names


def _score(run: Run, name: str) -> str:
    value, before = run.score(name), run.score_before(name)
    if value is None:
        return ""
    return f"{score_text(before)} → {score_text(value)}" if before is not None else score_text(value)


def _time(run: Run) -> str:
    if not run.seconds:
        return ""
    lives = len(run.log.lives)
    return duration(run.seconds) + (f", in {lives} processes one after the other" if lives > 1 else "")


def _speed(run: Run) -> str:
    speeds = [value for _, value in run.series("useful_tokens_per_second") if value is not None]
    return f"{statistics.median(speeds):,.0f} useful tokens/s (median of the steps)" if speeds else ""


def _memory(run: Run) -> str:
    peak = cost(run.metrics)["peak_memory_bytes"]
    return f"{peak / GIB:.2f} GiB at most" if peak else ""


def _saved(run: Run) -> list[tuple[str, str]]:
    assert run.folder is not None
    found = [(name, run.folder / name) for name in ("adapter", "model") if (run.folder / name).is_dir()]
    return [(name, f"{visible(str(place))}, {size_of(place)}") for name, place in found]


def age(seconds: float) -> str:
    """Write how long ago something was, in its largest unit: ``3 h``, ``12 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit != "d" and seconds >= length):
            return f"{int(seconds // length):,} {unit}"
    return f"{max(0, int(seconds))} s"


def check_svg(file: Path) -> None:
    """Raise a :class:`ConfigError` where a drawing cannot be written, before anything is read."""
    if file.suffix.lower() != ".svg":
        raise config_error("--svg", file, "must end in .svg", f"--svg {file.with_suffix('.svg')}")
    check_target("--svg", file)


def write_svg(report: Report, file: Path) -> None:
    """Write the loss curve as an SVG that needs no other file.

    Raises:
        CheckpointError: no loss was logged.
    """
    figures = loss_curves(report)
    if not figures:
        raise CheckpointError(str(report.folder), reason="has logged no loss to draw", hint="train it first")
    head = '<svg xmlns="http://www.w3.org/2000/svg" '
    drawing = figures[0].drawing.replace("<svg ", head, 1).replace(">", f"><style>{SVG_STYLE}</style>", 1)
    write_atomically(file, drawing.encode("utf-8", errors="backslashreplace"))
