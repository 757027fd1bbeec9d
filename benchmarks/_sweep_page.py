"""Write what `sweep.py` has found as a page: the bars first, then the figures that they are held against."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

GIB = 2**30
TITLES = {
    "apart": "`afina train`, one after the other",
    "forked": "`afina sweep sweep.fuse=off`: forks of one process, one after the other",
    "fused": "`afina sweep sweep.fuse=auto`: one process",
    "asha": "the same with `sweep.early_stopping=asha`",
}
# At least so many times faster than the trials apart, fused, and fused with early stopping; at most so many times the
# memory of one lone run.
SPEED_BAR, ASHA_BAR, MEMORY_BAR = 2.0, 3.4, 1.5
IN_FP32 = " Rounding in bf16 grows with the updates; in fp32 tests/distributed/test_together.py holds them to 1e-5."


def page(found: dict[str, Any]) -> str:
    """Return Markdown.

    Args:
        found: date, cores, load, model, steps, trials, min_steps; ``turns``: of each side seconds, step_seconds,
            peak_bytes, eval_losses (by trial) and, beside those trained apart, distance; ``choices``: of each seed the
            winners and the losses of the whole grid.
    """
    lines = [
        *("# A sweep as one process", ""),
        f"`python benchmarks/sweep.py`: {found['trials']} LoRA trials of {found['model']} on the headlines, "
        f"{found['steps']} updates of 16 rows each; {len(found['turns'])} turns in one sitting, forth and back "
        f"({found['cores']} CPU cores, {found['date']}, load average {found['load']:.0f}, its own included). Stopped "
        f"early: half of the trials go on from step {found['min_steps']}, half of these from twice as many, and so on.",
    ]
    turns = found["turns"]
    if turns:
        lines += [*bar_lines(turns), "", *side_lines(turns), *same_lines(turns)]
    if found["choices"]:
        lines += ["", *choice_lines(found["choices"])]
    return "\n".join(lines) + "\n"


def bar_lines(turns: list[dict[str, Any]]) -> list[str]:
    """Return the table of the bars: medians of the turns' own ratios."""
    lines: list[str] = []
    if has(turns, "apart", "fused"):
        speed = ratio(turns, "apart", "fused", "seconds")
        memory = ratio(turns, "fused", "apart", "peak_bytes")
        lines.append(bar("wall time of the trials apart over that of the fused sweep", speed, SPEED_BAR))
        lines.append(bar("peak memory of the fused sweep over that of one lone run", memory, MEMORY_BAR, at_most=True))
    if has(turns, "apart", "asha"):
        speed = ratio(turns, "apart", "asha", "seconds")
        lines.append(bar("wall time of the trials apart over that of the fused sweep stopped early", speed, ASHA_BAR))
    if has(turns, "fused", "asha"):
        speed = ratio(turns, "fused", "asha", "seconds")
        lines.append(f"| wall time of the fused sweep over that of the same stopped early | {speed:.2f} × | | |")
    return ["", "| | measured | bar | held |", "|---|---|---|---|", *lines] if lines else []


def bar(words: str, figure: float, limit: float, at_most: bool = False) -> str:
    """Return a row that holds a ratio against its bar."""
    held = figure <= limit if at_most else figure >= limit
    return f"| {words} | **{figure:.2f} ×** | {'≤' if at_most else '≥'} {limit:g} × | {'yes' if held else '**no**'} |"


def has(turns: list[dict[str, Any]], *sides: str) -> bool:
    """Return whether all these sides were run."""
    return all(side in turn for turn in turns for side in sides)


def ratio(turns: list[dict[str, Any]], above: str, below: str, key: str) -> float:
    """Return the median of the turns' ratios between two sides: both had the machine as it was in that turn."""
    return float(median(turn[above][key] / turn[below][key] for turn in turns))


def side_lines(turns: list[dict[str, Any]]) -> list[str]:
    """Return the table of the sides: medians, and each turn's wall time."""
    lines = [
        "Wall time is the commands', starts and ends included; steps: `step_seconds` of metrics.jsonl, of a fused "
        "group each step once. Memory: of the whole process tree, a shared page counted once.",
        "",
        "| | wall time s | each turn | steps s | steps, beside those apart | peak memory GiB |",
        "|---|---|---|---|---|---|",
    ]
    for side in (side for side in TITLES if side in turns[0]):
        shown: dict[str, Callable[[float], str]] = {"seconds": "{:.0f}".format, "step_seconds": "{:.1f}".format}
        wall, steps = (form(median(turn[side][key] for turn in turns)) for key, form in shown.items())
        each = ", ".join(f"{turn[side]['seconds']:.0f}" for turn in turns)
        beside = f"{ratio(turns, 'apart', side, 'step_seconds'):.2f} ×" if has(turns, "apart") else ""
        peak = median(turn[side]["peak_bytes"] for turn in turns) / GIB
        lines.append(f"| {TITLES[side]} | {wall} | {each} | {steps} | {beside} | {peak:.2f} |")
    return lines


def same_lines(turns: list[dict[str, Any]]) -> list[str]:
    """Return how far the trials of a sweep are from the same ones trained apart."""
    lines = [""]
    for side in ("forked", "fused"):
        if not has(turns, "apart", side):
            continue
        distance = max(turn[side]["distance"] for turn in turns)
        losses = max(
            abs(loss - turn["apart"]["eval_losses"][name])
            for turn in turns
            for name, loss in turn[side]["eval_losses"].items()
        )
        lines.append(
            f"- {side}: adapters within {distance:.1e} of those trained apart (relative Frobenius distance, the "
            f"largest of any tensor), held-out losses within {losses:.1e}." + (IN_FP32 if side == "fused" else "")
        )
    return lines if len(lines) > 1 else []


def choice_lines(choices: list[dict[str, Any]]) -> list[str]:
    """Return whether early stopping has found the best trial of the grid, a row a seed."""
    same = sum(choice["grid_winner"] == choice["asha_winner"] for choice in choices)
    lines = [
        *("## Does early stopping find the best trial?", ""),
        f"The tiny model, nine trials (r = 2, 4, 8 with three learning rates), 27 updates; a third goes on from step 3 "
        f"and of these a third from step 9. Its winner is the whole grid's with **{same} of {len(choices)}** seeds.",
        "",
        "| seed | best of the grid | eval loss | stopped early | its eval loss in the grid | place |",
        "|---|---|---|---|---|---|",
    ]
    for choice in choices:
        losses, best, found = choice["grid_losses"], choice["grid_winner"], choice["asha_winner"]
        place = 1 + sum(loss < losses[found] for loss in losses.values())
        lines.append(f"| {choice['seed']} | {best} | {losses[best]:.4f} | {found} | {losses[found]:.4f} | {place} |")
    return lines
