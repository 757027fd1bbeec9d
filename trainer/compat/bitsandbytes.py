"""bitsandbytes: quantised parameters, and a repacking that would end training in silence."""

from __future__ import annotations

from typing import Any

from trainer.compat import need, reach

LIBRARY = "bitsandbytes"


@reach(
    "Linear4bit.support_avx512bf16_for_cpu",
    upstream="https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078 (of the same packing)",
    until="Linear4bit unpacks its weights when it trains again, or its CPU kernel has a backward",
)
def keep_4bit_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for a fast CPU kernel at the first forward in evaluation mode.

    That kernel has no backward, and the weights are never packed back: after one evaluation, training would go on
    without the gradient that flows through the base, and would say nothing.

    Raises:
        LaunchError: a 4-bit layer has no such switch any more.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            need(LIBRARY, module, "support_avx512bf16_for_cpu")
            module.support_avx512bf16_for_cpu = False


@reach("the class name Params4bit", until="importing bitsandbytes is cheap where nothing is quantised")
def is_4bit(parameter: Any) -> bool:
    """Return whether a parameter holds 4-bit weights, two a byte, whatever dtype they are stored as.

    By name, so that bitsandbytes need not be imported (a second, and its notes on missing kernels).
    """
    return type(parameter).__name__ == "Params4bit"
