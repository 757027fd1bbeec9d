"""A merge that is proved: what is written answers as the live adapter did, or is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.test_method_kinds import KINDS, base, learnt
from tests.unit.tiny_models import MODELS
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.errors import CheckpointError
from trainer.merge import Merged, answers, check_mergeable, merge, merge_in_place
from trainer.methods import attach, load_adapter, save_adapter, trainable_parameters

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 40))]
QUICK = ("lora", "adalora", "ia3")  # what `make check` tries
LINEAR = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name, keys in KINDS.items()
    if keys.get("name", "lora") in QUICK
]


class Plain:
    """A tokenizer that saves nothing but a mark."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def card(result: Merged) -> str:
    return f"{result.distance}"


@pytest.mark.parametrize("name", LINEAR)
def test_a_merged_model_answers_as_the_live_one(name: str, tmp_path: Path) -> None:
    model, start = learnt(MethodConfig(**KINDS[name]))
    save_adapter(model, tmp_path / "a", {n: p.detach() for n, p in trainable_parameters(model).items()}, start)
    live = load_adapter(base(), tmp_path / "a").eval()
    expected = answers(live, PROMPTS)
    result = merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert result.distance < 1e-5
    assert result.same_choice == 1.0
    plain = reload(tmp_path / "merged")
    for one, other in zip(answers(plain, PROMPTS), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {f.name for f in (tmp_path / "merged").iterdir()} >= {"README.md", "tokenizer.json", "config.json"}
    assert not (tmp_path / "merged.partial").exists()


def test_a_broken_merge_is_caught_and_deleted(tmp_path: Path) -> None:
    model, _ = learnt(MethodConfig(r=4))

    def broken(live: Any) -> Any:
        folded: Any = merge_in_place(live)
        folded.model.layers[1].mlp.up_proj.weight.data *= 1.02
        return folded

    with pytest.raises(CheckpointError, match="from the live adapter's"):
        merge(model.eval, Plain(), PROMPTS, tmp_path / "merged", reload, card, fold=broken)
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_embedding_is_untied_from_the_output_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tied = MODELS["gpt2"]()
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    model = attach(tied, MethodConfig(r=4, target_modules=["wte"]), seed=0)
    for parameter in trainable_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    assert merge(model.eval, Plain(), PROMPTS, tmp_path / "merged", reload, card).distance < 1e-5


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        merge(base, Plain(), PROMPTS, tmp_path, reload, card)


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix", "full"])
def test_what_cannot_be_merged_is_refused_with_the_reason(method: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be merged"):
        check_mergeable(load([f"method={method}"]))
