"""Conversations to render, and the text of a rendering that is in the loss."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Example
from trainer.data.sources.rows import Row
from trainer.data.templates.encoded import Encoded

SYSTEM = {"role": "system", "content": "You are a travel assistant. Use the tools when you need facts."}
KYOTO = [
    SYSTEM,
    {"role": "user", "content": "What is the weather in Kyoto?"},
    {"role": "assistant", "content": '{"tool": "weather", "city": "Kyoto"}'},
    {"role": "tool", "content": '{"celsius": 20}'},
    {"role": "assistant", "content": "It is 20 °C in Kyoto."},
]
MADRID = [
    *[{**m, "content": m["content"].replace("Kyoto", "Madrid").replace("20", "29")} for m in KYOTO],
    {"role": "user", "content": "And how far is it to Quito?"},
    {"role": "assistant", "content": '{"tool": "distance", "from": "Madrid", "to": "Quito"}'},
    {"role": "tool", "content": '{"km": 9748}'},
    {"role": "assistant", "content": "Quito is 9748 km from Madrid."},
]
PLAIN = [m for m in MADRID if m["role"] in ("user", "assistant")][:2] + MADRID[5:6] + MADRID[8:]


def chat(messages: list[dict[str, Any]], **fields: Any) -> Example:
    return parse_example(Row({"messages": messages, **fields}, "chats.jsonl:1", 1), "chat", {})


def texts_in_loss(tokenizer: Any, found: Encoded) -> list[str]:
    """Decode each run of tokens in the loss."""
    pairs = groupby(zip(found.ids, found.loss_mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for in_loss, run in pairs if in_loss]


def stock(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> Any:
    return tokenizer.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True)
