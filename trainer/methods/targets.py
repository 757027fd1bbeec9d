"""Find the modules to adapt by named sets: attention_min, attention, all_linear, on any architecture that has them.

Experts of a mixture are in none: transformers 5 stacks them in parameters of three dimensions, which are no linear
layers (``target_parameters``). Routers are no target of ``all_linear`` either: trained on little data they send all
tokens to a few experts, and no loss here holds them back. (Stock PEFT's "all-linear" trains both where it knows the
model; on others neither.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from trainer.compat.peft import is_moved_to_experts
from trainer.config.method import METHODS, MethodConfig
from trainer.errors import ConfigError
from trainer.methods.bypassed import bypassed_layers
from trainer.methods.text_part import text_modules

# What attention calls its layers: the first row whose names all stand in one module, or in modules like it, is taken.
# (query, value); of compressed keys and values (DeepSeek) the parts that are unlike for each head.
ATTENTION_MIN = (
    ("q_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("query", "value"),
    ("q_b_proj", "kv_b_proj"),
    ("q_proj", "kv_b_proj"),
)
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("qkv_proj", "o_proj"),
    ("qkv_proj", "out_proj"),
    ("query_key_value", "dense"),
    ("c_attn", "c_proj"),
    ("Wqkv", "out_proj"),
    ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)
# The MLP's last projections, whose input IA3 scales.
DOWN = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj", "c_proj", "w2", "output_linear")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ROUTERS = {"gate", "router", "shared_expert_gate"}  # where they are linear layers, or stand around one


def target_names(model: nn.Module, wanted: Any) -> list[str]:
    """Return the endings of the names of the modules that get adapters, sorted.

    Args:
        model: the base model, also on the meta device.
        wanted: ``method.target_modules``: a set's name or a list of module names.

    Raises:
        ConfigError: a named module does not exist in this model or takes no adapter; the ones that do are listed.
    """
    if isinstance(wanted, str):
        found = _all_linear(model) if wanted == "all_linear" else _attention(model, wanted)
        return sorted(set(found) - _moved_to_experts(model, set(found)))
    for name in wanted:
        named = _ending_in(model, name)
        if not named or not all(map(is_target, named)):
            raise _no_such_module(model, name)
        if passed := bypassed_layers(model, (full for full in _linear(model) if ends_in(full, name))):
            raise not_trained(model, name, passed)
    if moved := _moved_to_experts(model, set(wanted)):
        raise ConfigError(
            "method.target_modules",
            value=", ".join(sorted(moved)),
            reason=f"is what PEFT calls the experts of {type(model).__name__}, and would not reach its linear layers",
            hint="method.target_modules=all_linear leaves them out",
        )
    return sorted(wanted)


def _all_linear(model: nn.Module) -> list[str]:
    """Return the endings of every linear layer but the head, the routers, and those of :func:`left_out`."""
    linear = [full for full in _linear(model) if not ROUTERS & set(full.split(".")[-2:])]
    wanted = set(linear) - set(left_out(model))
    if not wanted:
        raise _no_such_module(model, "all_linear")
    return shortest_endings((full for full, _ in text_modules(model)), wanted)


def _attention(model: nn.Module, wanted: str) -> list[str]:
    """Return the endings of the linear layers that attention's modules have, by the rows of names above."""
    linear = _linear(model)
    for row in ATTENTION_MIN if wanted == "attention_min" else ATTENTION:
        parents = {full.rpartition(".")[0] for full in linear if ends_in(full, row[0])}
        found = {full for full in linear if full.rpartition(".")[0] in parents and full.rpartition(".")[2] in row}
        if {full.rpartition(".")[2] for full in found} == set(row):
            return shortest_endings((full for full, _ in text_modules(model)), found)
    raise _no_such_module(model, wanted)


def left_out(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that ``all_linear`` leaves out because an adapter there would not be trained, or might
    not be; and why.

    Layers that have a number for a name are one of a list, of which a module uses some (Zamba2's shared layers).
    """
    linear = _linear(model)
    found = {full: f"{owner} reads the weight past the layer" for full, owner in bypassed_layers(model, linear).items()}
    numbered = (full for full in linear if full.rpartition(".")[2].isdigit())
    return found | dict.fromkeys(numbered, "one of a list of layers, not all of which are used")


def shortest_endings(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return endings that PEFT takes for some modules and for no others: the last part of a name where that does, else
    more of it. A module whose whole name another's ends in cannot be meant alone, and is left out.

    Args:
        names: full names of all modules.
        wanted: those that are meant.
    """
    others = [full.split(".") for full in set(names) - set(wanted)]
    rest, endings, odd = {full: full.split(".") for full in wanted}, set[str](), set[str]()
    for depth in range(1, 1 + max(map(len, rest.values()))):
        odd |= {".".join(parts[-depth:]) for parts in others}
        clean = {full: end for full, parts in rest.items() if (end := ".".join(parts[-depth:])) not in odd}
        endings |= set(clean.values())
        rest = {full: parts for full, parts in rest.items() if full not in clean}
    return sorted(endings)


def down_names(model: nn.Module, names: list[str]) -> list[str]:
    """Return those of some targets that are the MLP's last projection."""
    found = [name for name in names if name in DOWN or name.rpartition(".")[2] in set(DOWN) - {"c_proj"}]
    if "c_proj" in found:  # in GPT-2 attention has a c_proj too: only the MLP's is meant
        return [name for name in (*found, "mlp.c_proj") if name != "c_proj"]
    return found


def check_layers(model: nn.Module, layers: list[int] | None) -> list[int] | None:
    """Return ``method.layers``, checked against the model.

    Raises:
        ConfigError: the model has fewer layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    if layers is not None and max(layers) >= count:
        reason = f"{type(model).__name__} has {count} layers, numbered from 0 to {count - 1}"
        raise ConfigError("method.layers", value=layers, reason=reason, hint=f"numbers below {count}, or null for all")
    return layers


def layer_index(full: str) -> int | None:
    """Return the number of the layer that a module of this full name stands in."""
    return next((int(part) for part in full.split(".") if part.isdigit()), None)


def _ending_in(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules of the text part that PEFT takes a target name for."""
    return [module for full, module in text_modules(model) if ends_in(full, name)]


def ends_in(full: str, name: str) -> bool:
    """Return whether a full name is one that PEFT takes a name for: the same, or one that ends in it."""
    return full == name or full.endswith(f".{name}")


def is_target(module: nn.Module) -> bool:
    """Return whether a module takes an adapter: a linear layer, dense or quantised, or an embedding."""
    return _is_linear(module) or isinstance(module, nn.Embedding)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _linear(model: nn.Module) -> list[str]:
    """Return the full names of every linear layer of the text part but the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in text_modules(model) if _is_linear(module) and module is not head]


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacks of matrices, (experts, …, …), by name: no linear layers to adapters, nor to bitsandbytes."""
    return {
        f"{full}.{name}": parameter
        for full, module in text_modules(model)
        if not isinstance(module, CONVOLUTIONS)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and min(parameter.shape) > 1
    }


def adapted_modules(model: nn.Module) -> list[str]:
    """Return the last names of the modules that have adapters, in the model's order; none where no module is adapted.

    Args:
        model: with its adapters attached.
    """
    names = getattr(getattr(model, "base_model", None), "targeted_module_names", [])
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def describe_left_out(model: nn.Module, method: MethodConfig) -> str | None:
    """Return a sentence for the user where ``method.target_modules=all_linear`` leaves linear layers out; else nothing.

    Args:
        model: also with adapters attached.
        method: the ``method`` group.
    """
    if method.target_modules != "all_linear" or "target_modules" not in METHODS[method.name].keys:
        return None
    reasons: dict[str, set[str]] = {}
    for full, reason in left_out(model).items():
        reasons.setdefault(reason, set()).add(next(part for part in reversed(full.split(".")) if not part.isdigit()))
    if not reasons:
        return None
    listed = "; ".join(f"{', '.join(sorted(names))} ({reason})" for reason, names in reasons.items())
    return f"no adapter on {listed}: it would not be trained everywhere"


def _kinds(experts: dict[str, nn.Parameter]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in experts}))


def _moved_to_experts(model: nn.Module, names: set[str]) -> set[str]:
    """Return those of some names that stock PEFT takes for the experts', whatever linear layers bear them: before
    transformers 5, experts were linear layers of the names that dense and shared ones have."""
    if not expert_parameters(model):
        return set()
    return {name for name in names if is_moved_to_experts(model, name)}


def _no_such_module(model: nn.Module, name: str) -> ConfigError:
    passed = left_out(model)
    linear = Counter(full.rpartition(".")[2] for full in _linear(model) if full not in passed)
    listed = ", ".join(f"{n} (×{c})" for n, c in sorted(linear.items()))
    experts = expert_parameters(model)
    also = f"; its experts ({_kinds(experts)}) are 3-D parameters: method.target_parameters" if experts else ""
    what = "finds no attention of names that are known" if name.startswith("attention") else "takes no adapters"
    return ConfigError(
        "method.target_modules",
        value=name,
        reason=f"{what} in {type(model).__name__}, whose linear layers are {listed}{also}",
        hint="method.target_modules=all_linear, or a list of these",
    )


def not_trained(model: nn.Module, name: str, passed: dict[str, str]) -> ConfigError:
    """Build the error for a target that matches layers whose weight is read past them (:func:`bypassed_layers`)."""
    layer, owner = next(iter(passed.items()))
    works = ", ".join(target_names(model, "all_linear"))
    return ConfigError(
        "method.target_modules",
        value=name,
        reason=f"would not be trained everywhere: {owner} reads the weight of {layer} past the layer, and the adapter "
        "with it",
        hint=f"method.target_modules=all_linear, which is {works} here",
    )
