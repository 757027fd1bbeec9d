"""Say which runs one process has trained together, by their summaries, and what that has saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from launch.report.runs import as_map
from trainer.html import visible

MAX_NAMES = 8


def group_of(summary: Mapping[str, Any]) -> str | None:
    """Return the name of the group that a run was trained in last; ``None`` of a run by itself."""
    group = as_map(summary.get("together")).get("group")
    return None if group is None else str(group)


def sentences(summaries: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return a sentence a group of runs that were trained together.

    Args:
        summaries: of all runs, each with the run's name.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, summary in summaries:
        if (group := group_of(summary)) is not None:
            groups.setdefault(group, {})[name] = summary
    return [_sentence(group, members) for group, members in groups.items()]


def _sentence(group: str, members: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [as_map(summary.get("together")).get("trials") for summary in members.values()]
    count = max([len(members), *(found for found in counts if isinstance(found, int))])
    names = [visible(name) for name in members]
    told = ", ".join(names if len(names) <= MAX_NAMES else [*names[:MAX_NAMES], f"… ({len(names)})"])
    was_scored = any(name.endswith("_before") for s in members.values() for name in as_map(s.get("metrics")))
    once = "one start, one load of the base" + (" and one evaluation of it" if was_scored else "")
    return f"Trained together by one process ({visible(group)}): {told}; {once} in place of {count}."
