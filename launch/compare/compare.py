"""Compare methods: the same model, rows, order and updates for each, a process each; then a table.

A comparison is a folder of run folders: ``<run.dir>/<comparison>/<method>/``, with the tries of learning rates in
``tries/``. Started again, it does what is left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import trainer.config
from launch import process, torchrun
from launch.compare import report as comparison
from launch.compare.candidates import Candidate
from launch.together import TrialGroup, group_trials
from launch.trials import Job, Trial, default_run_name, digest_name, run_shared, take_turns
from trainer.config.messages import as_typed
from trainer.config.method import METHODS
from trainer.config.optimizers import default_learning_rate
from trainer.config.overrides import is_sweep
from trainer.config.rules.compare import parse_method
from trainer.errors import ConfigError
from trainer.tracking.files import find_summary

logger = logging.getLogger(__name__)

MORE_TRIES = 3  # rates beyond the grid, while the best one is at its edge
RATE = "optim.learning_rate"
METHOD_KEYS = frozenset().union(*(method.keys for method in METHODS.values()))


def run_comparison(typed: Sequence[str]) -> int:
    """Train every method of ``compare.methods`` and show the table, also written as CSV, Markdown and a picture.

    A method that cannot be trained here is a line with the reason; a failed one is reported and the others go on. One
    that another process is at is waited for at the end.

    Args:
        typed: Hydra overrides; a key of ``method`` counts for the methods that have it.

    Returns:
        0 when all that can be trained did, 1 when any failed, 75 (or 128 + signal) when it was stopped.

    Raises:
        ConfigError: what was typed cannot be used; nothing has been started.
    """
    folder, candidates = plan_comparison(typed)
    logger.info(f"comparison of {len(candidates)} methods in {folder}")

    def run(number: int, candidate: Candidate) -> Job:
        stopped = yield from _run_candidate(candidate, folder, f"[{number}/{len(candidates)}] {candidate.name}")
        comparison.write(folder, comparison.collect(candidates))  # there is something to look at from the first on
        return stopped

    stopped = take_turns([run(number, candidate) for number, candidate in enumerate(candidates, 1)])
    comparison.show(comparison.collect(candidates))
    comparison.write_page(folder)
    return stopped or int(any(candidate.error for candidate in candidates))


def _run_candidate(candidate: Candidate, folder: Path, label: str) -> Job:
    """Find a method's learning rate where that is asked for, and train it; return the exit code when it was stopped."""
    if candidate.config is None:
        logger.info(f"{label}: cannot be trained: {candidate.refused}")
        return 0
    compare_config = candidate.config.compare
    stopped = yield from _tune_learning_rate(candidate, folder, label)
    if not stopped and not candidate.error:
        rows = [] if compare_config.rows is None else [f"data.max_rows={compare_config.rows}"]
        candidate.trial = _build_trial(candidate, folder, folder_name(candidate.name), candidate.rate, rows)
        code, error = yield from run_shared(candidate.trial, label)
        stopped = code if code in process.STOPPED else 0
        candidate.error = error if code and not stopped else None
    return stopped


def plan_comparison(typed: Sequence[str]) -> tuple[Path, list[Candidate]]:
    """Plan a comparison: its folder and its methods, their configs composed and checked; start nothing.

    Raises:
        ConfigError: a choice that is the comparison's to make, or a config that no method can use.
    """
    for text in typed:
        group, _, option = text.partition("=")
        if group in ("method", "rank"):
            hint = as_typed("compare.methods", option.split(",") if group == "method" else ["lora r=16"])
            raise ConfigError(text, reason="the methods that are compared are compare.methods", hint=hint)
        if group.startswith("method.") and is_sweep([text]):
            each = [f"lora {group.removeprefix('method.')}={value}" for value in option.split(",")]
            hint = as_typed("compare.methods", each)
            raise ConfigError(text, reason="is several values, and each is a method of its own here", hint=hint)
    base = trainer.config.load([text for text in typed if not text.startswith("method.")])
    if base.compare.tune and base.data.validation == 0:
        reason = "judges the tries by held-out rows, and there are none (data.validation=0)"
        raise ConfigError("compare.tune", value=base.compare.tune, reason=reason, hint="data.validation=0.1")
    candidates = [_build_candidate(name, typed) for name in base.compare.methods]
    able = [candidate for candidate in candidates if candidate.config is not None]
    if not able:
        raise ConfigError("compare.methods", reason="none can be trained here", hint=str(candidates[0].refused))
    for candidate in able[1:]:  # the untrained model scores the same for all
        candidate.overrides.append("eval.before=false")
    given = next((text.partition("=")[2] for text in reversed(typed) if text.startswith("run.name=")), None)
    compare_config = base.compare
    parts = [default_run_name(candidate.config) for candidate in able if candidate.config]
    own = digest_name([*parts, f"{compare_config.rows} {compare_config.tune} {compare_config.tune_rows}"], "compare-")
    folder = Path(base.run.dir) / (given or own)
    if base.log.group is None:  # the tries of learning rates too, wherever their folders are
        for candidate in able:
            candidate.overrides.append(f"log.group={torchrun.quote(folder.name)}")
    return folder, candidates


def _build_candidate(name: str, typed: Sequence[str]) -> Candidate:
    """Build one method with what was typed; a key of ``method`` that it does not have is for the others."""
    option, method_overrides = parse_method(name)
    chosen = [f"method={option}", "rank=null"]
    candidate = Candidate(name, chosen)
    try:
        method = trainer.config.load([text for text in typed if not text.startswith("method.")] + chosen).method.name
        foreign = {f"method.{name}" for name in METHOD_KEYS - METHODS[method].keys}
        candidate.overrides = [
            *(text for text in typed if text.partition("=")[0] not in foreign),
            *chosen,
            *method_overrides,
        ]
        candidate.fixed = any(text.startswith(f"{RATE}=") for text in candidate.overrides)
        if not candidate.fixed:  # what an experiment chose suits its own method
            candidate.overrides.append(f"{RATE}=null")
        candidate.config = trainer.config.load(candidate.overrides)
        optim = candidate.config.optim
        candidate.rate = optim.learning_rate or default_learning_rate(method, optim.name)
    except ConfigError as error:
        candidate.refused = str(error)
    return candidate


def _tune_learning_rate(candidate: Candidate, folder: Path, label: str) -> Job:
    """Find the learning rate on fewer rows: the grid, then beyond its edge for as long as the edge is best.

    Returns:
        The exit code when it was stopped, else 0.
    """
    assert candidate.config is not None
    grid = sorted(candidate.config.compare.tune)
    if not grid or candidate.fixed:
        return 0
    fewer = [f"data.max_rows={candidate.config.compare.tune_rows}", "checkpoint.every_steps=0", "eval.metrics=[loss]"]
    ratio = grid[-1] / grid[-2] if len(grid) > 1 else 3.0
    rates: list[float] = [_two_digits(candidate.rate * multiple) for multiple in grid]
    for _ in range(1 + MORE_TRIES):
        tries = {}
        for rate in rates:
            name = f"{folder_name(candidate.name)}-{rate:g}"
            tries[rate] = _build_trial(candidate, folder / "tries", name, rate, [*fewer, "eval.before=false"])
        outcomes = yield from _run_tries(tries, folder / "tries", label)
        for rate, (code, _) in outcomes.items():
            if code in process.STOPPED:
                return code
            loss = (find_summary(tries[rate].folder).get("metrics") or {}).get("eval_loss")
            candidate.tried[rate] = math.inf if code or loss is None else loss
        if math.isinf(min(candidate.tried.values())):  # not for the rate's sake, then
            candidate.error = next(reversed(outcomes.values()))[1]
            return 0
        beyond = next_rate(candidate.tried, ratio)
        if beyond is None:
            break
        rates = [beyond]
    candidate.rate = best_rate(candidate.tried)
    return 0


def _run_tries(
    tries: Mapping[float, Trial], folder: Path, label: str
) -> Generator[str, None, dict[float, tuple[int, str]]]:
    """Run a try a learning rate, in one process those that it can train together; after a stop no other is begun.

    Args:
        tries: by their rates.
        folder: that they have their folders in.
        label: of the method.

    Returns:
        The outcomes by rate, as of :func:`launch.trials.run_trial`.

    Yields:
        Which try it is and who trains it, as long as that is another process.
    """
    rates, trials = list(tries), list(tries.values())
    labels = {trial.name: f"{label}, learning rate {rate:g}" for rate, trial in tries.items()}
    outcomes: dict[float, tuple[int, str]] = {}
    for found in group_trials(trials, trials[0].config.sweep.fuse):
        members = [trials[place] for place in found.places]
        if found.alone is None:
            ended = yield from TrialGroup(members, folder, labels).run()
        else:
            (trial,) = members
            ended = {trial.name: (yield from run_shared(trial, labels[trial.name]))}
        outcomes |= {rates[place]: ended[trials[place].name] for place in found.places if trials[place].name in ended}
        if any(code in process.STOPPED for code, _ in ended.values()):
            break
    return outcomes


def best_rate(tried: dict[float, float]) -> float:
    """Return the rate of the lowest loss; of equals the lowest rate."""
    return min(sorted(tried), key=lambda rate: tried[rate])


def next_rate(tried: dict[float, float], ratio: float) -> float | None:
    """Return the rate to try beyond the edge of what was tried, when the best one is there; else ``None``.

    Args:
        tried: loss by rate.
        ratio: between neighbours, above 1.
    """
    best = best_rate(tried)
    if best == min(tried):
        return _two_digits(best / ratio)
    return _two_digits(best * ratio) if best == max(tried) else None


def _two_digits(rate: float) -> float:
    """Round a rate to two digits: more would say more than a try can tell."""
    return float(f"{rate:.1e}")


def _build_trial(candidate: Candidate, folder: Path, name: str, rate: float, more: Sequence[str]) -> Trial:
    where = {"run.dir": str(folder), "run.name": name}
    placed = [f"{key}={torchrun.quote(value)}" for key, value in where.items()]
    overrides = [*candidate.overrides, *more, f"{RATE}={rate!r}", *placed]
    return Trial(name, overrides, {}, trainer.config.load(overrides))


def folder_name(method: str) -> str:
    """Build a folder name: ``lora r=8`` is ``lora-r8``."""
    kept = method.replace(" ", "-").replace("=", "")
    return "".join(sign if sign.isalnum() or sign in "._-" else "-" for sign in kept)
