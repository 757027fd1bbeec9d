"""The models' own chat templates, which ship with the package trl, and a small tokenizer that knows their tokens."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

# How each ends an answer, and a turn with tool calls; what it takes (single, multi, tools, reasoning).
ENDS = {
    "qwen2_5": (("<|im_end|>",) * 2, "single multi tools"),
    "qwen3": (("<|im_end|>",) * 2, "single multi tools reasoning"),
    "qwen3_instruct_2507": (("<|im_end|>",) * 2, "single multi tools"),
    "qwen3_5_think": (("<|im_end|>",) * 2, "single multi tools reasoning"),
    "llama3": (("<|eot_id|>",) * 2, "single multi"),
    "llama3_1": (("<|eot_id|>",) * 2, "single multi tools"),
    "phi3": (("<|end|>",) * 2, "single multi"),
    "gemma3": (("<end_of_turn>",) * 2, "single multi"),
    "gptoss": (("<|return|>", "<|call|>"), "single multi tools reasoning"),
    "glm4moe": (("<|endoftext|>",) * 2, "single multi tools reasoning"),
    "lfm2_v2": (("<|im_end|>",) * 2, "single multi tools"),
    "nemotron_3_nano": (("<|im_end|>",) * 2, "single multi tools reasoning"),
    "deepseekv3": (("<｜end▁of▁sentence｜>",) * 2, "single multi"),
    "muse_glimmer": (("<|eot|>",) * 2, "single multi tools"),
}
_CONTROL = r"<[|｜][^|｜<>\s]{1,40}[|｜]>|<(?:start|end)_of_turn>"


def model_template(name: str) -> str:
    """Return one of the templates; skip the test where trl is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("needs trl, which carries the models' own chat templates: pip install -e '.[dev]'")
    return (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def knowing(tokenizer: Any, template: str, eos: str) -> Any:
    """A copy of a tokenizer with a chat template, the tokens that it writes, and an end token."""
    from tokenizers import AddedToken

    changed = copy.deepcopy(tokenizer)
    known = changed.get_vocab()
    special = sorted({*re.findall(_CONTROL, template), eos} - set(known))
    changed.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tags = [name for name in ("<think>", "</think>", "<tool_call>", "</tool_call>") if name not in known]
    changed.add_tokens([AddedToken(name, special=False, normalized=False) for name in tags])
    changed.chat_template, changed.eos_token = template, eos
    changed.bos_token = changed.bos_token or "<|endoftext|>"
    return changed
