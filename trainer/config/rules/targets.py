"""Check which modules and parameters get adapters, as far as it is known without the model."""

from __future__ import annotations

import re
from typing import Any

from trainer.config.messages import as_typed, config_error, listing, nearest
from trainer.config.method import MethodConfig

TARGET_SETS = ("attention_min", "attention", "all_linear")
PARAMETER_SETS = ("experts",)
REGEX_CHARACTERS = frozenset("*+?|()[]{}^$\\")  # a dot alone is that of a module's name


def check_targets(method: MethodConfig) -> None:
    """Raise a :class:`ConfigError` for targets that are none, or that an adapted parameter does not go with."""
    _target_modules(method)
    _exclude_modules(method.exclude_modules)
    if method.target_parameters is not None:
        _target_parameters(method.target_parameters)
        _plain_lora(method)


def is_regex(value: Any) -> bool:
    """Return whether a value of ``target_modules`` or ``exclude_modules`` is a regular expression."""
    return isinstance(value, str) and not REGEX_CHARACTERS.isdisjoint(value)


def _target_modules(method: MethodConfig) -> None:
    name, value = "method.target_modules", method.target_modules
    must = f"must be {listing(TARGET_SETS)}, or a list of module names"
    if is_regex(value):
        _regex(name, value)
    elif isinstance(value, str):
        if value not in TARGET_SETS:
            near = nearest(value, TARGET_SETS)
            raise config_error(name, value, must, as_typed(name, near or [value]))
    elif not isinstance(value, list):
        none = "[] for none" if method.target_parameters is not None else f"{name}=all_linear"
        raise config_error(name, value, must, none)
    elif value == [] and method.target_parameters is not None:
        return
    elif not _are_names(value):
        reason = "must be a list of one or more module names"
        raise config_error(name, value, reason, as_typed(name, ["q_proj", "v_proj"]))


def _exclude_modules(value: Any) -> None:
    name = "method.exclude_modules"
    if value is None:
        return
    if is_regex(value):
        _regex(name, value)
    elif not isinstance(value, list) or not _are_names(value):
        reason = "must be a list of one or more module names, or a regular expression of whole ones"
        hint = as_typed(name, [value] if isinstance(value, str) and value.strip() else ["down_proj"])
        raise config_error(name, value, reason, f"{hint}, or null")


def _target_parameters(value: Any) -> None:
    if value in PARAMETER_SETS or (isinstance(value, list) and _are_names(value)):
        return
    name = "method.target_parameters"
    near = nearest(value, PARAMETER_SETS) if isinstance(value, str) else "experts"
    reason = "must be experts, or a list of the ends of parameters' names"
    raise config_error(name, value, reason, as_typed(name, near or [value]))


def _plain_lora(method: MethodConfig) -> None:
    """Refuse what PEFT has no form for where LoRA is on a parameter: it has no inputs and outputs of its own."""
    if method.dropout > 0:
        reason = "drops inputs of a layer, and a parameter (method.target_parameters) has none of its own"
        raise config_error(
            "method.dropout", method.dropout, reason, "method.dropout=0 or method.target_parameters=null"
        )
    if method.dora:
        reason = "has no form for parameters that are no linear layers (method.target_parameters; peft 0.21)"
        raise config_error("method.dora", True, reason, "method.dora=false or method.target_parameters=null")
    if method.init not in ("default", "gaussian"):
        reason = "has no form for stacks of matrices (method.target_parameters; peft 0.21)"
        raise config_error("method.init", method.init, reason, "method.init=default or method.target_parameters=null")


def _are_names(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, str) and item.strip() for item in value)


def _regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        hint = as_typed(name, r".*\.layers\.[0-3]\..*(q|v)_proj")
        raise config_error(name, value, f"is no regular expression ({error})", hint) from error
