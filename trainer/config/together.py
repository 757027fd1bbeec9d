"""Which runs can be trained together, as LoRA adapters on one base in one process; and which of them with which.

What must be the same is decided from outside in: every key, but for those that are named here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.identity import values_of
from trainer.config.rules.method import changes_base
from trainer.config.schema import TrainConfig

MAX_TOGETHER = 16
"""Runs in a group of ``auto``: each forward holds the rows of all."""
OWN_KEYS = frozenset(
    [
        *("method.r", "method.alpha", "method.rslora", "method.target_modules", "method.layers"),
        "method.exclude_modules",
        *("method.rank_pattern", "method.alpha_pattern", "method.init", "method.seed"),
        *("batch.epochs", "batch.max_steps", "eval.best_metric", "eval.patience", "run.stop_at_step"),
    ]
)
"""What each run of a group has of its own, besides the sections below: its adapter, and how long it trains."""
OWN_SECTIONS = frozenset({"optim", "schedule"})
NAMES = frozenset({"run.name", "run.dir", "log.name", "log.group", "log.tags"})
"""Where a run is kept and what it is called."""
UNREAD_SECTIONS = frozenset({"sweep", "compare"})
"""No run by itself reads them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Hold which runs are trained by one process.

    Attributes:
        places: of the runs in the list that was grouped, rising.
        alone: why it is one run by itself; ``None`` of a group of several.
    """

    places: tuple[int, ...]
    alone: str | None = None


def why_alone(config: TrainConfig) -> str | None:
    """Return why a run cannot be trained together with others, naming the key; ``None`` where it can.

    Args:
        config: checked.
    """
    method, zero = config.method, config.zero
    ratio, alpha = config.optim.lora_plus_ratio, config.model.neftune_alpha
    obstacles: list[tuple[bool, str]] = [
        (method.name != "lora", f"method.name={method.name}: only the adapters of LoRA share a base"),
        (method.dora, "method.dora=true: its norms are of the base's weights and the adapter's together"),
        (method.dropout > 0, f"method.dropout={method.dropout:g}: its random numbers are those of a run by itself"),
        (method.target_parameters is not None, "method.target_parameters: adapted stacks are made for one adapter"),
        (method.bias != "none", f"method.bias={method.bias}: it trains biases of the base, which all would share"),
        (method.adapter is not None, f"method.adapter={method.adapter}: a warm start is of one run"),
        (changes_base(method), f"method.init={method.init}: it changes the base's weights, which all would share"),
        (ratio is not None, f"optim.lora_plus_ratio={ratio}: its A and B are two groups of the optimizer"),
        (config.optim.name != "adamw", f"optim.name={config.optim.name}: of several at once there is only AdamW"),
        (config.model.new_tokens is not None, "model.new_tokens: they are embedded as one run has trained them"),
        (method.trainable_tokens is not None, "method.trainable_tokens: all share the embeddings of the base"),
        (method.modules_to_save is not None, "method.modules_to_save: all share the modules of the base"),
        (config.model.dtype == "fp16", "model.dtype=fp16: its loss scale is that of one run"),
        (alpha is not None, f"model.neftune_alpha={alpha}: its random numbers are those of a run by itself"),
        (config.model.compile, "model.compile=true: what is compiled is the model with one adapter"),
        (zero.offload_optimizer != "none", f"zero.offload_optimizer={zero.offload_optimizer}: it holds those of one"),
        (zero.offload_params != "none", f"zero.offload_params={zero.offload_params}: it holds those of one run"),
        (config.fault.non_finite == "rewind", "fault.non_finite=rewind: the others would go back with it"),
        (_is_path(config.checkpoint.resume), "checkpoint.resume names the checkpoint of one run"),
        (config.launch.nodes > 1, f"launch.nodes={config.launch.nodes}: each node would begin a group of its own"),
    ]
    return next((reason for applies, reason in obstacles if applies), None)


def alike(config: TrainConfig) -> Hashable:
    """Return what a run must have in common with another to be trained together with it: equal keys, equal values."""
    return json.dumps(_common(config), sort_keys=True, default=str)


def group(configs: Sequence[TrainConfig], fuse: str | int, at_once: int = 1) -> list[Group]:
    """Group runs that can be trained together.

    Which runs may be together depends on their configs alone. Where there are too many for one group they are cut into
    as few as hold them, but at least as many as keep the devices busy, of even sizes.

    Args:
        configs: of the runs.
        fuse: ``sweep.fuse``: auto, off, or at most so many runs in a group.
        at_once: how many processes run at once, each on a device of its own.

    Returns:
        Groups in the order of their first runs; each run is in one.
    """
    if fuse == "off" or fuse == 1:
        return [Group((place,), f"sweep.fuse={fuse}") for place in range(len(configs))]
    most = MAX_TOGETHER if fuse == "auto" else int(fuse)
    kinds: dict[Hashable, list[int]] = {}
    groups = []
    for place, config in enumerate(configs):
        if (reason := why_alone(config)) is not None:
            groups.append(Group((place,), reason))
        else:
            kinds.setdefault(alike(config), []).append(place)
    together = sum(map(len, kinds.values()))
    for places in kinds.values():
        share = math.ceil(len(places) * at_once / together)
        parts = min(len(places), max(math.ceil(len(places) / most), share))
        for part in _evenly(places, parts):
            groups.append(Group(part, _without_others(configs, part[0], kinds) if len(part) == 1 else None))
    return sorted(groups, key=lambda found: found.places)


def _without_others(configs: Sequence[TrainConfig], place: int, kinds: dict[Hashable, list[int]]) -> str:
    """Say why a run that could be trained together with others is by itself."""
    if len(kinds[alike(configs[place])]) > 1:
        return "each process has a device of its own, and there are as many as trials"
    others = [found[0] for found in kinds.values() if found[0] != place]
    if not others:
        return "there is no other that could be trained with it"
    ours, theirs = _common(configs[place]), _common(configs[others[0]])
    differing = [name for name, value in ours.items() if value != theirs[name]]
    return f"no other has its {', '.join(differing)}"


def _evenly(places: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Cut into neighbours, the sizes of which differ by one at most."""
    ends = [len(places) * part // parts for part in range(parts + 1)]
    return [tuple(places[begin:end]) for begin, end in itertools.pairwise(ends)]


def _common(config: TrainConfig) -> dict[str, Any]:
    own = OWN_KEYS | NAMES
    sections = OWN_SECTIONS | UNREAD_SECTIONS
    values = values_of(config).items()
    return {name: value for name, value in values if name not in own and name.partition(".")[0] not in sections}


def _is_path(resume: str) -> bool:
    return resume not in ("auto", "strict", "never")
