"""A trial's adapter is written as a run of its own writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.helpers.adapters import base, logits
from trainer.config.method import MethodConfig
from trainer.methods import attach, create_runtime, trainable_parameters
from trainer.methods.attach import attach_trials
from trainer.methods.base_record import BASE_FILE, BaseRecord
from trainer.methods.parameters import trial_parameters
from trainer.together.trial_runtime import TrialRuntime

# trial_1's name begins as trial_10's does
TRIALS: dict[str, dict[str, Any]] = {
    "trial_1": {"r": 4},
    "trial_10": {"r": 2, "alpha": 3.0, "rslora": True, "target_modules": ["q_proj", "down_proj"], "layers": [1]},
    "trial_2": {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}, "init": "gaussian"},
}


@pytest.mark.parametrize("name", TRIALS)
def test_saves_what_a_run_of_its_own_saves(name: str, tmp_path: Path) -> None:
    methods = {n: MethodConfig(**keys) for n, keys in TRIALS.items()}
    group = attach_trials(base(), {n: (method, 5) for n, method in methods.items()})
    alone = attach(base(), methods[name], 5)
    runtimes = [TrialRuntime(group, methods[name], name), create_runtime(alone, methods[name])]
    weights = [trial_parameters(group, name), trainable_parameters(alone)]
    assert weights[0].keys() == weights[1].keys()
    assert all(runtime.is_untouched(dict(own)) for runtime, own in zip(runtimes, weights, strict=True))
    torch.manual_seed(0)
    trained = {n: torch.randn_like(p) for n, p in weights[1].items()}
    record = BaseRecord("tiny", "hub", hub_id="someone/tiny", revision="abc")
    for model, runtime, folder in zip((group, alone), runtimes, ("one", "two"), strict=True):
        runtime.base = record
        assert not runtime.is_untouched(trained)
        runtime.save(model, tmp_path / folder, trained)
    files = [{file.name: file.read_bytes() for file in (tmp_path / f).iterdir()} for f in ("one", "two")]
    assert files[0] == files[1]
    assert files[0].keys() == {"adapter_model.safetensors", "adapter_config.json", BASE_FILE}
    with torch.no_grad():
        for parameter, value in zip(weights[1].values(), trained.values(), strict=True):
            parameter.copy_(value)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "one")), logits(alone))
