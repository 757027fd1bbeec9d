"""DeepSpeed with several parameter groups: what ZeRO holds of each."""

from __future__ import annotations

from typing import Any

from trainer.compat import need, reach
from trainer.compat.deepspeed import LIBRARY, fp32_shares


@reach(
    "optimizer.averaged_gradients, .sub_group_to_group_id",
    until="DeepSpeedEngine gives the reduced gradients, or norms and clipping, by parameter group",
)
def reduced_gradients(optimizer: Any, zero_stage: int, groups: int) -> list[list[Any]]:
    """Return this rank's share of the reduced gradients of each parameter group, between the reduction and the step.

    They are those that the step takes: what is written to them counts. Under stage 3 a parameter without a gradient in
    this step has that of an earlier one.

    Args:
        optimizer: ZeRO's.
        zero_stage: 1, 2 or 3.
        groups: how many there are.

    Raises:
        LaunchError: an attribute is missing.
    """
    need(LIBRARY, optimizer, "averaged_gradients", *(["sub_group_to_group_id"] if zero_stage == 3 else []))
    out: list[list[Any]] = [[] for _ in range(groups)]
    for number, gradients in optimizer.averaged_gradients.items():
        out[optimizer.sub_group_to_group_id[number] if zero_stage == 3 else number] += gradients
    return out


@reach("optimizer.sub_group_to_group_id", until="as fp32_shares")
def fp32_shares_by_group(optimizer: Any, zero_stage: int, groups: int) -> list[list[Any]]:
    """Return :func:`fp32_shares` by parameter group: stage 3 cuts a large group into several."""
    shares = fp32_shares(optimizer, zero_stage)
    if zero_stage < 3:
        return [[share] for share in shares]
    need(LIBRARY, optimizer, "sub_group_to_group_id")
    out: list[list[Any]] = [[] for _ in range(groups)]
    for number, share in enumerate(shares):
        out[optimizer.sub_group_to_group_id[number]].append(share)
    return out
