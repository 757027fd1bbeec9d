"""Keep beside a run's config what its null, auto and short names stood for, so that a later version repeats the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trainer.config.method import METHODS, default_alpha
from trainer.config.optimizers import OPTIMIZERS, default_learning_rate
from trainer.config.schema import TrainConfig

TAKEN = "taken"
"""The section of ``config.yaml`` that holds them, by dotted key; no section of the configuration."""
HEADING = "# What null, auto and short names above stood for. Another version takes rate and alpha from here.\n"


def default_values(config: TrainConfig) -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the defaults that depend on other keys, as far as no torch is needed.

    Args:
        config: of which those are returned that are null.
    """
    optim = {"name": config.optim.name, "learning_rate": config.optim.learning_rate}
    values = {"optim": optim, "method": _method_values(config)}
    return {name: value for name, value in _defaults(values) if value is not None}


def repeated(tree: Mapping[str, Any], taken: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted key, value)`` of each key that is null in a run's file and that this version would take otherwise
    than the run has.

    Args:
        tree: the sections of the run's ``config.yaml``.
        taken: its section ``taken``, as it stands there.
    """
    if isinstance(taken, Mapping):
        for name, value in _defaults(tree):
            if name in taken and taken[name] != value:
                yield name, taken[name]


def _method_values(config: TrainConfig) -> dict[str, Any]:
    method = config.method
    return {"name": method.name, "alpha": method.alpha, "r": method.r, "init_r": method.init_r}


def _defaults(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what this version takes for the keys that are null, and whose default depends on others."""
    method, optim = tree.get("method"), tree.get("optim")
    if not isinstance(method, Mapping) or str(method.get("name")) not in METHODS:
        return
    if isinstance(optim, Mapping) and optim.get("learning_rate") is None:
        name = str(optim.get("name") or "adamw")  # that of runs from before there was a choice
        if name in OPTIMIZERS:
            yield "optim.learning_rate", default_learning_rate(str(method.get("name")), name)
    rank = method.get({"lora": "r", "adalora": "init_r"}.get(str(method.get("name")), ""))
    if isinstance(rank, int) and method.get("alpha") is None:
        yield "method.alpha", default_alpha(rank)
