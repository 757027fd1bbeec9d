"""Measure what a step costs: time, tokens, memory, and the share of the devices' arithmetic that it used."""

from __future__ import annotations

from typing import Any

import torch

from trainer.data.step_batches import StepBatches
from trainer.distributed.process_group import World
from trainer.engine.device import peak_memory, reset_peak_memory
from trainer.engine.flops import ModelFlops, count_flops
from trainer.engine.peak_flops import peak_flops


class Meter:
    """Turn a step's raw numbers into the keys of metrics.jsonl.

    Args:
        world: this process.
        model: with its trainable parameters; counted here, before ZeRO partitions it.
        dtype: of its arithmetic.
        flops: what the model costs, where it is not what ``model`` says.

    Attributes:
        flops: what the model costs a token.
        peak: of one device.
    """

    def __init__(self, world: World, model: Any, dtype: torch.dtype, flops: ModelFlops | None = None) -> None:
        self.world = world
        self.flops = flops or count_flops(model)
        self.peak = peak_flops(world.device, dtype)
        self._best = self.peak.per_second

    def start(self) -> None:
        """Count the peak of memory from now on: what loading and verifying took is not a step's."""
        reset_peak_memory(self.world.device)

    def measure(
        self, seconds: float, data_seconds: float, made: StepBatches, computed_flops: float, trials: int = 1
    ) -> dict[str, float | int]:
        """Return the cost of one step over all ranks: tokens are one trial's, the rest is what the devices did for all.

        Args:
            seconds: wall time of the step.
            data_seconds: of which it waited for its batches.
            made: these batches.
            computed_flops: what the devices computed, over all ranks (:meth:`ModelFlops.of_batches`).
            trials: that were trained on these batches at once.
        """
        if self.peak.is_measured:
            # Measured beside other work it was too low: what a step has done is a lower bound of what can be done.
            self._best = max(self._best, computed_flops / seconds / self.world.world_size)
        available = seconds * self._best * self.world.world_size
        useful_flops = trials * self.flops.of_rows(made.lengths, made.label_tokens)
        return {
            "useful_tokens": made.useful_tokens,
            "computed_tokens": made.computed_tokens,
            "useful_tokens_per_second": made.useful_tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": data_seconds,
            **peak_memory(self.world.device),
            "model_flops_utilization": computed_flops / available,
            "useful_flops_utilization": useful_flops / available,
        }
