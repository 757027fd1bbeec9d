"""Choose the modules that get adapters: a named set, a list or a regular expression, less what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from trainer.compat.peft import is_moved_to_experts
from trainer.config.messages import config_error, nearest
from trainer.config.method import MethodConfig
from trainer.config.rules.targets import is_regex
from trainer.methods.bypassed import bypassed_layers
from trainer.methods.targets import (
    check_layers,
    ends_in,
    expert_parameters,
    is_target,
    layer_index,
    not_trained,
    target_names,
)
from trainer.methods.text_part import text_modules

SHOWN = 8  # names of modules in a message


def chosen_modules(
    model: nn.Module, method: MethodConfig, also: Iterable[str] = ()
) -> tuple[list[str], list[int] | None]:
    """Choose the modules that get adapters.

    PEFT would read a regular expression itself, but on a mixture it moves what one matches to names alone, in all
    layers; and it has no layers beside one. So one becomes whole names, as does what is left when some are left out.

    Args:
        model: the base model, also on the meta device.
        method: the ``method`` group, checked.
        also: names of more modules.

    Returns:
        names, the ends of names or whole ones, sorted; and the layers that count for them, ``None`` where they do not.

    Raises:
        ConfigError: a module does not exist in this model, takes no adapter, or nothing is left.
    """
    layers, wanted = check_layers(model, method.layers), method.target_modules
    if not is_narrowed(method):
        return sorted({*target_names(model, wanted), *also}), layers
    names = _matched(model, wanted) if is_regex(wanted) else whole_names(model, target_names(model, wanted))
    names = [*names, *(name for name in whole_names(model, also) if name not in names)]
    if method.exclude_modules is not None:
        names = _left(names, method.exclude_modules)
    if layers is not None:
        there = sorted({index for name in names if (index := layer_index(name)) is not None})
        names = [name for name in names if layer_index(name) in layers]
        if not names:
            reason = f"leaves out all that method.target_modules has, which is in layers {there}"
            raise config_error("method.layers", layers, reason, "some of these, or null for all")
    return sorted(names), None


def is_narrowed(method: MethodConfig) -> bool:
    """Return whether modules are chosen by their whole names: by a regular expression, or less some."""
    return is_regex(method.target_modules) or method.exclude_modules is not None


def whole_names(model: nn.Module, ends: Iterable[str]) -> list[str]:
    """Return the whole names of the modules that have one of these names or ends of names."""
    wanted = list(ends)
    return [full for full, _ in text_modules(model) if any(ends_in(full, end) for end in wanted)]


def _matched(model: nn.Module, pattern: str) -> list[str]:
    key, modules = "method.target_modules", dict(text_modules(model))
    found = [full for full in modules if full and re.fullmatch(pattern, full)]
    takers = [full for full, module in modules.items() if is_target(module)]
    if not found:
        near = nearest(pattern, takers, cutoff=0.0)
        kinds = sorted(set(map(_in_any_layer, takers)))
        reason = f"matches no whole name of a module of {type(model).__name__}, whose linear layers are "
        raise config_error(key, pattern, f"{reason}{_some(kinds)}", f"a pattern that matches {near}, such as .*q_proj")
    if odd := [full for full in found if full not in takers]:
        kinds = sorted({f"{_in_any_layer(full)} ({type(modules[full]).__name__})" for full in odd})
        hint = f"{key}='{pattern}' with the ends of linear layers' names, such as .*_proj"
        raise config_error(key, pattern, f"also matches what takes no adapter: {_some(kinds)}", hint)
    if expert_parameters(model) and (moved := [full for full in found if is_moved_to_experts(model, full)]):
        reason = f"matches {_some(moved)}: PEFT takes these names for the experts', not for linear layers"
        raise config_error(key, pattern, reason, "method.target_parameters=experts adapts those")
    if passed := bypassed_layers(model, found):
        raise not_trained(model, pattern, passed)
    return found


def _left(names: list[str], left_out: str | list[str]) -> list[str]:
    """Return names of modules without those that match, or that have one of the names, or are inside of it."""
    key = "method.exclude_modules"
    for one in [left_out] if isinstance(left_out, str) else left_out:
        if any(_is_excluded(name, one) for name in names):
            continue
        parts = {part for name in names for part in name.split(".") if not part.isdigit()}
        near = nearest(one, parts, cutoff=0.3)
        reason = f"leaves nothing out of method.target_modules, which stands for {_some(names)}"
        raise config_error(key, one, reason, f"{key}=[{near}]" if near else f"{key}=null")
    kept = [name for name in names if not any(_is_excluded(name, one) for one in _each(left_out))]
    if not kept:
        raise config_error(key, left_out, "leaves nothing of method.target_modules", f"{key}=null")
    return kept


def _each(left_out: str | list[str]) -> list[str]:
    return [left_out] if isinstance(left_out, str) else left_out


def _is_excluded(name: str, one: str) -> bool:
    return bool(re.fullmatch(one, name)) if is_regex(one) else f".{one}." in f".{name}."


def _in_any_layer(full: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", full)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
