"""Loading: the attention that a model is given, and what quantising leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.architectures import tiny
from tests.helpers.logged import logged_lines
from trainer.config import load
from trainer.errors import ModelError
from trainer.methods.target_parameters import describe_unreached
from trainer.models.loading import load_model

CPU = torch.device("cpu")


def test_a_model_with_capped_scores_keeps_the_attention_of_its_authors(tmp_path: Path) -> None:
    model = tiny("gemma2", initializer_range=1.0)
    model.save_pretrained(tmp_path)
    keys = load(["debug=tiny"])
    loaded: Any = load_model(str(tmp_path), keys.model, keys.method, torch.float32, CPU, 2)
    ids = torch.arange(2, 30)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    keys.model.attention = "sdpa"
    with pytest.raises(ModelError, match=r"→ model\.attention=auto"):
        load_model(str(tmp_path), keys.model, keys.method, torch.float32, CPU, 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_passes_over_experts(bits: int, tmp_path: Path) -> None:
    tiny("mixtral", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    keys = load(["debug=tiny", f"method.bits={bits}"])
    model: Any = load_model(str(tmp_path), keys.model, keys.method, torch.bfloat16, CPU, 2)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    assert {p.dtype for p in layer.mlp.experts.parameters()} == {torch.bfloat16}
    assert "not quantised" in (describe_unreached(model, keys.method) or "")


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').write('it has run')",)


def test_weights_that_are_pickles_are_read_as_data_and_told(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    keys = load(["debug=tiny"])

    def loaded() -> Any:
        return load_model(str(tmp_path), keys.model, keys.method, torch.float32, CPU, 2)

    with logged_lines() as said:
        assert torch.equal(loaded().lm_head.weight, model.lm_head.weight)
    assert sum("the weights are pickles, read as data" in line for line in said) == 1
    torch.save({"lm_head.weight": _Bomb(tmp_path / "EXECUTED")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        loaded()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "EXECUTED").exists()
