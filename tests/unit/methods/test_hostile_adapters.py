"""Adapters from somebody else: each is loaded, or refused in one line, and nothing is allocated by its word alone."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.errors import CheckpointError
from trainer.methods.load import ADAPTER_FILE, load_adapter, read_adapter_config


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return tmp_path


def changed(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_no_module_is_imported_by_its_word(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (theirs / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(theirs))
    changed(theirs, megatron_config={"a": 1}, megatron_core="evil")
    with pytest.raises(CheckpointError, match="names a module"):
        load_adapter(base(), theirs)


def test_it_loads_as_it_is(theirs: Path) -> None:
    loaded, saved = load_adapter(base(), theirs).state_dict(), load_file(theirs / ADAPTER_FILE)
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize("values", [{"r": 2**20}, {"rank_pattern": {"q_proj": 2**22}}, {"r": 1e30}, {"r": 17}])
def test_a_rank_that_no_tensor_has_is_refused_before_it_is_allocated(theirs: Path, values: dict[str, Any]) -> None:
    changed(theirs, **values)
    model = base()
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="no saved tensor has a size above 16"):
        load_adapter(model, theirs)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(theirs: Path, value: float) -> None:
    tensors = load_file(theirs / ADAPTER_FILE)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = value
    save_file(tensors, theirs / ADAPTER_FILE)
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        load_adapter(base(), theirs)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"peft_type":' * 50_000, "", "null", "{", '{"peft_type": 5}'])
def test_a_config_that_is_none_is_one_line(theirs: Path, text: str) -> None:
    (theirs / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_adapter(base(), theirs)
    assert "\n" not in str(error.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-5, 2**30), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip
KEYS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "bias", "peft_type", "task_type"),
    *("fan_in_fan_out", "init_lora_weights", "layers_to_transform", "modules_to_save", "use_dora", "use_rslora"),
    *("base_model_name_or_path", "auto_mapping", "lora_dropout", "num_virtual_tokens", "init_r", "unheard_of"),
    *("revision", "megatron_config"),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_config_loads_or_is_refused_in_one_line(theirs: Path, values: dict[str, Any]) -> None:
    original = (theirs / "adapter_config.json").read_text()
    changed(theirs, **values)
    said = ""
    try:
        load_adapter(base(), theirs)
    except CheckpointError as error:
        said = str(error)
    finally:
        (theirs / "adapter_config.json").write_text(original)
    assert "\n" not in said
    read_adapter_config(theirs)
