"""Find the parameters that get adapters though they are no linear layers: the stacked experts of a mixture.

PEFT adapts such a parameter of (experts, …, …) by a pair of matrices an expert, and adds their product to the whole
stack at every forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.compat.peft import is_adapted_parameter
from trainer.config.messages import as_typed, config_error, listing
from trainer.config.method import MethodConfig
from trainer.methods.targets import CONVOLUTIONS, check_layers, ends_in, expert_parameters, is_target, layer_index
from trainer.methods.text_part import text_modules

KEY = "method.target_parameters"
END_PARTS = 3  # of a name that stands for the same parameter of each layer: mlp.experts.gate_up_proj


def parameter_names(model: nn.Module, method: MethodConfig) -> list[str] | None:
    """Return the names by which PEFT finds the adapted parameters: the ends of their names, or whole ones.

    Args:
        model: the base model, also on the meta device.
        method: the ``method`` group, checked.

    Returns:
        names, sorted; ``None`` where no parameter is adapted.

    Raises:
        ConfigError: the model has no such parameter, or it is of a kind that takes no adapter.
    """
    wanted = method.target_parameters
    if wanted is None:
        return None
    if wanted == "experts":
        found = list(_adaptable(model, expert_parameters(model)))
        if not found:
            reason = f"{type(model).__name__} has no experts that are 3-D parameters"
            raise config_error(KEY, wanted, reason, f"{KEY}=null")
        ends = sorted({".".join(name.split(".")[-END_PARTS:]) for name in found})
    else:
        found, ends = matching(model, wanted), sorted(wanted)
    layers = check_layers(model, method.layers)
    if layers is not None:
        inside = [name for name in found if layer_index(name) in layers]
        if not inside:
            there = listing(sorted({index for name in found if (index := layer_index(name)) is not None}))
            reason = f"leaves out every layer that has {_kinds(found)}: {there}"
            raise config_error("method.layers", layers, reason, "some of these, or null for all")
        return inside
    return ends if sorted(matching(model, ends)) == sorted(found) else sorted(found)


def matching(model: nn.Module, ends: list[str]) -> list[str]:
    """Return the whole names of the parameters whose names end so.

    Raises:
        ConfigError: there is none for one of the ends, or it takes no adapter.
    """
    every = dict(_parameters_by_name(model))
    found: dict[str, Any] = {}
    for end in ends:
        own = {name: p for name, p in every.items() if ends_in(name, end)}
        if not own:
            experts = expert_parameters(model)
            has = f"has {_kinds(experts)}" if experts else "has no experts that are 3-D parameters"
            reason = f"no parameter of {type(model).__name__}, beside those of layers that are targets as modules, "
            raise config_error(KEY, end, f"{reason}has a name with this end; it {has}", f"{KEY}=experts, or null")
        found |= _adaptable(model, own)
    return list(found)


def _parameters_by_name(model: nn.Module) -> Any:
    for full, module in text_modules(model):
        if is_target(module) or isinstance(module, CONVOLUTIONS):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{full}.{name}", parameter


def _adaptable(model: nn.Module, parameters: dict[str, Any]) -> dict[str, Any]:
    for name, parameter in parameters.items():
        dimensions = len(whole_shape(parameter))
        if parameter.is_floating_point() and dimensions in (2, 3):
            continue
        held = f"{dimensions} dimensions" if parameter.is_floating_point() else f"{parameter.dtype} values, packed"
        reason = f"{name} of {type(model).__name__} has {held}; adapters are for 2 and 3 dimensions of floats"
        raise config_error(KEY, _kinds([name]), reason, f"{KEY}=null")
    return parameters


def check_patterns(method: MethodConfig, names: list[str]) -> None:
    """Refuse a pattern of ranks or alphas for none of the adapted modules and parameters, by their whole names.

    PEFT warns of one, but of those for parameters too, though it follows them.
    """
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(method, key).items():
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                reason = f"is for nothing that gets an adapter, which are {_kinds(names)}"
                raise config_error(f"method.{key}", {pattern: value}, reason, as_typed(f"method.{key}", {}))


def adapted_parameters(model: nn.Module) -> dict[int, str]:
    """Return the last parts of the adapted parameters' names by the ``id`` of the parameter, in the model's order."""
    return {
        id(layer.get_param()): f"{name.replace('.base_layer', '').rpartition('.')[2]}.{layer.parameter_name}"
        for name, layer in model.named_modules()
        if is_adapted_parameter(layer)
    }


def adapters_of_parameters(model: nn.Module) -> set[int]:
    """Return the ``id`` of each tensor of an adapter that is on a parameter."""
    layers = [layer for layer in model.modules() if is_adapted_parameter(layer)]
    return {id(p) for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}


def describe_unreached(model: nn.Module, method: MethodConfig) -> str | None:
    """Return a sentence for the user where a model has experts that no adapter reaches, or that are dense in a base of
    fewer bits; else nothing.

    Args:
        model: the base model, with its adapters in it.
        method: the ``method`` group.
    """
    experts, adapted = expert_parameters(model), adapted_parameters(model)
    told = unreached = {name: p for name, p in experts.items() if id(p) not in adapted}
    clauses = []
    if unreached:
        clauses.append("which no adapter reaches")
    if method.bits < 16 and experts:
        told = unreached or experts
        clauses.append(f"not quantised: method.bits={method.bits} holds for the other layers")
    if not clauses:
        return None
    count = sum(p.numel() for p in told.values())
    said = f"experts: {count:,} weights ({_kinds(told)}) are 3-D parameters, {' and '.join(clauses)}"
    if method.target_parameters is not None:
        return said
    return f"{said}; {'' if method.name == 'lora' else 'method=lora '}{KEY}=experts adapts them"


def _kinds(names: Iterable[str]) -> str:
    plain = (name.replace(".base_layer", "") for name in names)
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in plain}))
