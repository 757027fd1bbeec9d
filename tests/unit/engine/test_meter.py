"""The share of a device's arithmetic that a step has used is never more than all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.step_batches import StepBatches
from trainer.distributed.process_group import World
from trainer.engine import meter as module
from trainer.engine.meter import Meter
from trainer.engine.peak_flops import PeakFlops


@pytest.mark.parametrize(("is_measured", "expected"), [(True, [0.5, 1.0, 0.5]), (False, [0.5, 2.0, 1.0])])
def test_a_step_that_beats_a_measured_peak_becomes_it(
    is_measured: bool, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "peak_flops", lambda *_: PeakFlops(10.0, "here", is_measured))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))
    meter = Meter(World(rank=0, world_size=2, local_rank=0, device=torch.device("cpu")), model, torch.float32)
    made = StepBatches(np.arange(1), np.asarray([5]), 1, 5, [])
    found = [meter.measure(1.0, 0.0, made, flops)["model_flops_utilization"] for flops in (10.0, 40.0, 20.0)]
    assert found == expected
