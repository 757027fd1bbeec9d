"""A configuration field that carries its own documentation, its own limits, and whether it changes a run's result."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    help: str,
    *,
    changes_result: bool = True,
    resume_may_change: bool = False,
    grants: bool = False,
    newer: bool = False,
    **limits: Any,
) -> Any:
    """Return a documented dataclass field.

    The two marks are all that ``identity.py`` knows: a run's default name, "is this finished run the same" and what a
    checkpoint must match are derived from them.

    Args:
        default: the value when no YAML and no override sets it; a list or dict is copied for each config.
        help: one sentence: meaning, unit, effect or cost.
        changes_result: whether another value gives other weights (beyond the order of sums). ``False`` for where and
            how a run is carried out, saved, scored and logged: it may differ and the run is still the same run.
        resume_may_change: of a field that changes the result, whether a run may be resumed from a checkpoint that was
            written with another value (a longer run, another learning rate): the state that was saved keeps its
            meaning. ``False`` binds the checkpoint to the value.
        grants: whether it lets something happen to this machine that a file from somebody else must not ask for: it
            counts where it is typed, or in one's own ``conf/``.
        newer: whether it came after runs were named without it: at its default it has no part in a run's default name,
            so that such a run is found and goes on.
        **limits: any of ``choices`` (tuple of allowed values), ``ge``, ``gt``, ``le``, ``lt`` (numeric bounds).
    """
    unknown = set(limits) - {"choices", "ge", "gt", "le", "lt"}
    assert not unknown, f"unknown limits {unknown}"
    assert changes_result or not resume_may_change, "what does not change the result may always change at a resume"
    marks = {"changes_result": changes_result, "resume_may_change": resume_may_change, "grants": grants, "newer": newer}
    metadata = {"help": help, **marks, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)
