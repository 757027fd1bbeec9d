"""The compatibility of optimizers: with an option of ``zero``, a method, and their own keys. No torch.

One list of refusals, each with what was seen when the cell was tried; everything else works:
``tests/distributed/optimizer_cases.py`` trains every cell that is not refused here. ``check.py`` refuses by it before a
model is loaded, ``afina doctor --matrix`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config.messages import as_typed, config_error, listing
from trainer.config.optimizers import OPTIMIZERS
from trainer.config.rules.matrix import ZERO
from trainer.config.schema import TrainConfig
from trainer.config.suggestions import config_fields, default_value

OWN_KEYS = ("beta1", "beta2", "eps", "momentum")
"""Of ``optim``: those that do not mean something for every optimizer."""


@dataclass(frozen=True, slots=True)
class OptimizerCell:
    """One combination."""

    name: str
    zero_stage: int
    offloads: bool = False
    trains_matrices: bool = True


@dataclass(frozen=True, slots=True)
class OptimizerRefusal:
    """A kind of cell that does not work.

    Attributes:
        holds: whether a cell is of this kind.
        seen: what happens when it is tried.
        hint: what to type instead.
    """

    holds: Callable[[OptimizerCell], bool]
    seen: str
    hint: str


REFUSALS = (
    OptimizerRefusal(
        lambda c: c.name == "muon" and c.zero_stage > 0,
        "ZeRO 1 to 3 flatten the weights, and it takes whole matrices (torch 2.13, seen on CPU); the Muon of DeepSpeed "
        "0.19 clips what it has made orthogonal, not the gradient, and is another optimizer",
        "zero=stage0, or optim.name=adamw",
    ),
    OptimizerRefusal(
        lambda c: OPTIMIZERS[c.name].needs_whole_matrices and c.zero_stage > 0,
        "ZeRO 1 to 3 flatten the weights, and it would keep the whole second moment of a vector, 4 bytes a value, and "
        "clip over all tensors at once (transformers 5, seen on CPU)",
        "zero=stage0, or optim.name=adamw_8bit",
    ),
    OptimizerRefusal(
        lambda c: c.name == "paged_adamw_8bit" and c.offloads,
        "its state is in host memory with the weights, and has no pages there (bitsandbytes 0.50, seen on CPU)",
        "optim.name=adamw_8bit, or zero.offload_optimizer=none",
    ),
    OptimizerRefusal(
        lambda c: c.name == "muon" and not c.trains_matrices,
        "it is for matrices between layers, and this method trains vectors or virtual tokens",
        "optim.name=adamw",
    ),
)


def optimizer_refusal(cell: OptimizerCell) -> OptimizerRefusal | None:
    """Return why a cell does not work; ``None`` when it does."""
    return next((each for each in REFUSALS if each.holds(cell)), None)


def optimizer_cells() -> dict[tuple[str, str], OptimizerCell]:
    """Build every combination of optimizer and option of ``zero``, works or not."""
    return {
        (name, zero): OptimizerCell(name, stage, zero.endswith("_offload"))
        for name in OPTIMIZERS
        for zero, stage in ZERO.items()
    }


def check_optimizer(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for an optimizer that does not go with the rest, or a key that it does not have."""
    name, method = config.optim.name, config.method
    has_none = method.name in ("ia3", "prompt") or (method.name == "prefix" and not method.prefix_projection)
    cell = OptimizerCell(name, config.zero.stage, config.zero.offload_optimizer != "none", not has_none)
    if (found := optimizer_refusal(cell)) is not None:
        raise config_error("optim.name", name, found.seen, found.hint)
    for key in OWN_KEYS:
        neutral, value = default_value(config_fields()[f"optim.{key}"].field), getattr(config.optim, key)
        if key not in OPTIMIZERS[name].keys and value != neutral:
            owners = [other for other, info in OPTIMIZERS.items() if key in info.keys]
            reason = f"has no meaning for {OPTIMIZERS[name].title} (optim.name={name})"
            hint = f"{as_typed(f'optim.{key}', neutral)}, or optim.name={listing(owners)}"
            raise config_error(f"optim.{key}", value, reason, hint)
