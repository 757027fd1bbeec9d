"""Which class loads a checkpoint: what its own config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers.architectures import tiny
from tests.helpers.wrappers import WRAPPERS, tiny_wrapper
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.errors import ModelError
from trainer.methods import attach, trainable_parameters
from trainer.methods.text_part import other_parts
from trainer.models.loading import load_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 3, 4, 2, 11]])


def loaded(folder: Path, dtype: torch.dtype = torch.float32, zero_stage: int = 2, **method: Any) -> Any:
    model = load(["debug=tiny"]).model
    return load_model(str(folder), model, MethodConfig(**{"r": 4, **method}), dtype, CPU, zero_stage)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_loaded_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = tiny_wrapper(name).eval()
    saved.save_pretrained(tmp_path)
    model = loaded(tmp_path).eval()
    assert type(model) is type(saved)
    expected, found = saved.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    torch.testing.assert_close(model(IDS).logits, saved(IDS).logits)


def test_a_text_part_that_was_saved_alone_is_loaded_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = tiny_wrapper("qwen3_5 wrapper")
    alone = transformers.AutoModelForCausalLM.from_config(whole.config)
    alone.save_pretrained(tmp_path)
    assert type(loaded(tmp_path)) is type(alone) is not type(whole)
    tiny("gemma3").save_pretrained(tmp_path / "gemma3")
    assert type(loaded(tmp_path / "gemma3")) is transformers.Gemma3ForCausalLM


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.Florence2Config()
    config.architectures = ["Florence2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(florence2\)"):
        loaded(tmp_path)


@pytest.mark.parametrize(("bits", "zero_stage"), [(8, 2), (4, 2), (4, 3)])
@pytest.mark.parametrize("name", ["gemma3 wrapper", "qwen2_5_vl wrapper", "llama4 wrapper"])
def test_a_quantised_wrapper_trains_its_text_part(name: str, bits: int, zero_stage: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_wrapper(name).save_pretrained(tmp_path)
    base = loaded(tmp_path, torch.bfloat16, zero_stage, bits=bits)
    model = attach(base, MethodConfig(r=4, bits=bits), seed=0).train()
    for full, parameter in trainable_parameters(model).items():
        if "lora_B" in full:
            torch.nn.init.normal_(parameter, std=0.05)
    model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss.backward()
    assert not [full for full, p in trainable_parameters(model).items() if p.grad is None or not p.grad.any()]
    dense = {p.dtype for part in other_parts(model).values() for p in part.parameters()}
    assert dense & {torch.uint8, torch.int8} or zero_stage == 3
