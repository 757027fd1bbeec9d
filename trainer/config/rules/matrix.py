"""The compatibility matrix: method, base precision, ZeRO stage, gradient checkpointing, packing. No torch.

One list of refusals, each with what was seen when the cell was tried; everything else works:
``tests/distributed/method_cases.py`` trains every cell that is not refused here. ``check.py`` refuses by it before a
model is loaded, ``afina doctor --matrix`` prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainer.config.messages import config_error
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError

# Options of `method` that are methods of their own; those for a quantised base are lora with method.bits.
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora"},
    "rslora": {"name": "lora", "rslora": True},
    "lora_new_tokens": {"name": "lora", "trainable_tokens": "new"},
    "lora_modules_to_save": {"name": "lora", "modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"name": "lora", "dora": True},
    "experts": {"name": "lora", "target_parameters": "experts"},
    "adalora": {"name": "adalora"},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt"},
    "prefix": {"name": "prefix"},
    "bottleneck": {"name": "bottleneck"},
}
BITS = (16, 8, 4)
ZERO = {"stage0": 0, "stage1": 1, "stage2": 2, "stage3": 3, "stage2_offload": 2, "stage3_offload": 3}  # option: stage


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination."""

    method: MethodConfig
    zero_stage: int
    checkpointing: bool = False
    packing: str = "auto"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A kind of cell that does not work.

    Attributes:
        holds: whether a cell is of this kind.
        key: the key in conflict, shown with its value.
        seen: what happens when it is tried.
        hint: what to type instead.
    """

    holds: Callable[[Cell], bool]
    key: str
    seen: str
    hint: str


REFUSALS = (
    Refusal(
        lambda c: c.method.name == "full" and c.method.bits != 16,
        "method.bits",
        "a quantised weight cannot be trained: it has no gradient (method.name=full)",
        "method.bits=16; method=qlora trains adapters on a quantised base",
    ),
    Refusal(
        lambda c: c.method.dora and c.method.bits == 8,
        "method.dora",
        "on a base in 8 bits the scales of the weights are lost in its first forward (peft 0.21, seen on CPU), and the "
        "next evaluation fails",
        "method.bits=4, method.bits=16 or method=qlora_8bit",
    ),
    Refusal(
        lambda c: c.method.dora and c.method.bits == 4 and c.zero_stage == 3,
        "method.dora",
        "on a base in 4 bits its first forward replaces weights that ZeRO-3 has split (peft 0.21, seen on CPU), and "
        "the backward fails",
        "zero=stage2, method.bits=16 or method=qlora",
    ),
    Refusal(
        lambda c: c.method.name == "prefix" and c.checkpointing,
        "model.gradient_checkpointing",
        "prefix tuning hands its keys and values over in the cache, and PEFT refuses checkpointing beside it",
        "model.gradient_checkpointing=false or method=prompt rank=null",
    ),
    Refusal(
        lambda c: c.method.name in ("prompt", "prefix") and c.packing == "trie",
        "batch.packing",
        "virtual tokens stand before every row, and a trie has no place for them",
        "batch.packing=padded, or auto, which then pads",
    ),
)


def refusal(cell: Cell) -> Refusal | None:
    """Return why a cell does not work; ``None`` when it does."""
    return next((each for each in REFUSALS if each.holds(cell)), None)


def check_cell(cell: Cell) -> None:
    """Raise a :class:`ConfigError` for a cell that does not work."""
    found = refusal(cell)
    if found is not None:
        raise _error(found, cell)


def _error(found: Refusal, cell: Cell) -> ConfigError:
    section, _, name = found.key.partition(".")
    values = {"model.gradient_checkpointing": cell.checkpointing, "batch.packing": cell.packing}
    value = getattr(cell.method, name) if section == "method" else values[found.key]
    return config_error(found.key, value, found.seen, found.hint)


def cells() -> dict[tuple[str, int, str], Cell]:
    """Build every combination of method, bits and option of ``zero``, works or not."""
    return {
        (variant, bits, zero): Cell(MethodConfig(bits=bits, **keys), stage)
        for variant, keys in VARIANTS.items()
        for bits in BITS
        for zero, stage in ZERO.items()
    }
