"""Check which tokens are new, and that their embeddings are trained: a row that is not stays what it starts as."""

from __future__ import annotations

from typing import Any

from trainer.config.messages import as_typed, config_error
from trainer.config.method import METHODS, MethodConfig
from trainer.config.new_tokens import ENTRIES, new_tokens
from trainer.config.schema import TrainConfig

NEW = "new"
"""Of ``method.trainable_tokens``: those of ``model.new_tokens``."""


def check_tokens(config: TrainConfig) -> None:
    """Raise a :class:`ConfigError` for new tokens or trained embeddings that cannot be."""
    _new_tokens(config.model.new_tokens)
    _trainable_tokens(config.method.trainable_tokens)
    _modules_to_save(config.method.modules_to_save)
    _are_trained(config.method, list(new_tokens(config.model)))


def _new_tokens(given: Any) -> None:
    key, example = "model.new_tokens", ["<|tool|>", "word"]
    if given is None:
        return
    if not isinstance(given, list) or not given:
        hint = as_typed(key, [given] if _is_token(given) else example)
        raise config_error(key, given, "must be a list of one or more tokens", hint)
    for item in given:
        if not _is_token(item) and not _is_described(item):
            reason = "is no token: each is a text, or {text: …, special: true or false}"
            raise config_error(key, item, reason, as_typed(key, [*example, {"text": "<tool>", "special": True}]))
    names = [item["text"] if isinstance(item, dict) else item for item in given]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise config_error(key, twice[0], "is there twice", "leave one out")


def _is_described(item: Any) -> bool:
    is_whole = isinstance(item, dict) and item.keys() == ENTRIES
    return is_whole and _is_token(item["text"]) and isinstance(item["special"], bool)


def _trainable_tokens(given: Any) -> None:
    key = "method.trainable_tokens"
    if given is None or given == NEW:
        return
    if not isinstance(given, list) or not given or not all(map(_is_token, given)) or len(set(given)) < len(given):
        hint = as_typed(key, [given] if isinstance(given, str) and given else NEW)
        raise config_error(key, given, "must be new, or a list of one or more tokens, each once", hint)


def _modules_to_save(given: Any) -> None:
    key = "method.modules_to_save"
    if given is None:
        return
    if not given or not all(map(_is_token, given)) or len(set(given)) < len(given):
        reason = "must be a list of one or more module names, each once"
        raise config_error(key, given, reason, as_typed(key, ["embed_tokens", "lm_head"]))


def _are_trained(method: MethodConfig, new: list[str]) -> None:
    key = "method.trainable_tokens"
    if method.trainable_tokens == NEW and not new:
        hint = f"{as_typed('model.new_tokens', ['<|tool|>'])}, or name tokens: {as_typed(key, ['<|tool|>'])}"
        raise config_error(key, NEW, "means those of model.new_tokens, and there are none", hint)
    if not new or method.name == "full":
        return
    if "trainable_tokens" not in METHODS[method.name].keys:
        reason = f"cannot be trained by {METHODS[method.name].title}: their embeddings would stay what they start as"
        raise config_error("model.new_tokens", new, reason, f"method=lora {key}={NEW}, or method=full")
    if method.trainable_tokens is None and method.modules_to_save is None:
        reason = "have embeddings that nothing trains: they would stay what they start as"
        modules = as_typed("method.modules_to_save", ["embed_tokens", "lm_head"])
        raise config_error("model.new_tokens", new, reason, f"{key}={NEW}, or {modules}")
    listed = method.trainable_tokens if isinstance(method.trainable_tokens, list) else new
    if left := [token for token in new if token not in listed]:
        reason = f"leaves out {', '.join(left)}, which model.new_tokens adds: nothing would train them"
        raise config_error(key, listed, reason, as_typed(key, [*listed, *left]))


def _is_token(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
