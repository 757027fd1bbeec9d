"""A merged multimodal model is the whole model: its text part as the live one, its towers as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.helpers.logged import logged_lines
from tests.helpers.wrappers import WRAPPERS, tiny_wrapper
from trainer.config.method import MethodConfig
from trainer.merge.merge import logits_at_positions, merge
from trainer.methods import attach, trainable_parameters
from trainer.models.processor_files import copy_processor_files

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 35))]
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
PATCHES = torch.randn(4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
GRID = torch.tensor([[1, 2, 2]])
# What one image becomes for the text part, where a class takes it cheaply.
IMAGES: dict[str, Callable[[Any], Any]] = {
    "gemma3 wrapper": lambda model: model.get_image_features(PIXELS),
    "llava wrapper": lambda model: model.get_image_features(PIXELS),
    "internvl wrapper": lambda model: model.get_image_features(PIXELS),
    "mistral3 wrapper": lambda model: model.get_image_features(PIXELS.repeat(1, 1, 2, 1), image_sizes=[(16, 8)]),
    "qwen2_5_vl wrapper": lambda model: model.get_image_features(PATCHES, GRID),
    "qwen3_vl wrapper": lambda model: model.get_image_features(PATCHES, GRID),
    "qwen3_5 wrapper": lambda model: model.get_image_features(PATCHES, GRID),
    "llama4 wrapper": lambda model: model.get_image_features(PIXELS, vision_feature_select_strategy="default"),
}


class Plain:
    """A tokenizer that saves nothing but a mark."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForImageTextToText.from_pretrained(str(folder), dtype=dtype).eval()


def image_features(name: str, model: Any) -> Tensor:
    with torch.no_grad():
        found = IMAGES[name](model)
    found = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_merged_wrapper_is_read_as_a_whole(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_wrapper(name).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 8}')
    live = attach(stock(tmp_path / "base"), MethodConfig(r=4), seed=0).eval()
    for full, parameter in trainable_parameters(live).items():
        if "lora_B" in full:
            nn.init.normal_(parameter, std=0.1)
    expected = logits_at_positions(live, PROMPTS)
    result = merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", stock, lambda result: "")
    assert result.is_multimodal
    assert result.distance < 1e-5 < 1e-3 < result.base_distance
    base, merged = stock(tmp_path / "base"), stock(tmp_path / "merged")
    assert type(merged) is type(base)
    for one, other in zip(logits_at_positions(merged, PROMPTS), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if name in IMAGES:
        before = image_features(name, base)
        assert before.abs().sum() > 0
        assert torch.equal(image_features(name, merged), before)
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text()) == {"size": 8}
    names = [set(json.loads((tmp_path / which / "config.json").read_text())) for which in ("base", "merged")]
    assert names[0] == names[1]


def test_an_embedding_that_is_adapted_is_untied_in_every_config(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_wrapper("gemma3 wrapper").save_pretrained(tmp_path / "base")
    live = attach(stock(tmp_path / "base"), MethodConfig(r=4, target_modules=["embed_tokens"]), seed=0).eval()
    for full, parameter in trainable_parameters(live).items():
        if "embedding_A" in full or "embedding_B" in full:
            nn.init.normal_(parameter, std=0.3)
    result = merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", stock, lambda result: "")
    assert result.distance < 1e-5 < 1e-3 < result.base_distance


def test_processor_files(tmp_path: Path) -> None:
    """A template of its own is copied where the tokenizer has none; what is there is kept; none at all is told."""
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_wrapper("gemma3 wrapper").save_pretrained(base)
    out.mkdir()
    with logged_lines() as said:
        copy_processor_files(stock(base), out, None)
    assert any("no processor's files are found" in line for line in said)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
        (base / name).write_text(f'"{name}"')
    (out / "processor_config.json").write_text("mine")
    copy_processor_files(stock(base), out, None)
    assert (out / "chat_template.json").read_text() == '"chat_template.json"'
    assert (out / "processor_config.json").read_text() == "mine"
    (out / "chat_template.json").unlink()
    (out / "chat_template.jinja").write_text("the tokenizer's")
    copy_processor_files(stock(base), out, None)
    assert not (out / "chat_template.json").exists()
