"""Find the modules to adapt by named sets: attention_min, attention, all_linear, on any architecture that has them.

Experts of a mixture are out of reach: transformers 5 stacks them in parameters of three dimensions, which are no linear
layers. Routers are no target of ``all_linear`` either: trained on little data they send all tokens to a few experts,
and no loss here holds them back. (Stock PEFT's "all-linear" trains both where it knows the model; on others neither.)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from trainer.compat.peft import is_moved_to_experts
from trainer.errors import ConfigError

# Names of (query, value) and of all attention projections; the first row whose names all exist is taken.
ATTENTION_MIN = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",), ("Wqkv",), ("query", "value"))
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("c_attn", "attn.c_proj"),  # mlp.c_proj is there too
    ("Wqkv", "out_proj"),
)
# The MLP's last projections, whose input IA3 scales.
DOWN = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "c_proj", "w2")
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
    linear = _linear_names(model)
    if wanted == "all_linear":
        every = {n.rpartition(".")[2] for n in _linear(model) if not ROUTERS & set(n.split(".")[-2:])}
        return sorted(every - _moved_to_experts(model, every))
    if isinstance(wanted, str):
        for names in ATTENTION_MIN if wanted == "attention_min" else ATTENTION:
            if all(any(_is_linear(m) for m in _ending_in(model, name)) for name in names):
                return sorted(names)
        raise _no_such_module(model, wanted, linear)
    for name in wanted:
        found = _ending_in(model, name)
        if not found or not all(_is_linear(m) or isinstance(m, nn.Embedding) for m in found):
            raise _no_such_module(model, name, linear)
    if moved := _moved_to_experts(model, set(wanted)):
        raise ConfigError(
            "method.target_modules",
            value=", ".join(sorted(moved)),
            reason=f"is what PEFT calls the experts of {type(model).__name__}, and would not reach its linear layers",
            hint="method.target_modules=all_linear leaves them out",
        )
    return sorted(wanted)


def down_names(model: nn.Module, names: list[str]) -> list[str]:
    """Return those of some targets that are the MLP's last projection."""
    found = [name for name in names if name in DOWN]
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
    """Return the modules that PEFT takes a target name for."""
    return [module for full, module in model.named_modules() if full == name or full.endswith(f".{name}")]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _linear(model: nn.Module) -> list[str]:
    """Return the full names of every linear layer but the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if _is_linear(module) and module is not head]


def _linear_names(model: nn.Module) -> Counter[str]:
    """Return the last name parts of every linear layer but the output head, with how often each occurs."""
    return Counter(name.rpartition(".")[2] for name in _linear(model))


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the stacks of matrices, (experts, …, …), by name: no adapter reaches them, nor does bitsandbytes."""
    return {
        f"{full}.{name}": parameter
        for full, module in model.named_modules()
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


def describe_unreached(model: nn.Module, bits: int) -> str | None:
    """Return a sentence for the user where a model has experts that adapters pass over; else nothing."""
    experts = expert_parameters(model)
    if not experts:
        return None
    not_quantised = f", and are not quantised: method.bits={bits} holds for the other layers" if bits < 16 else ""
    count = sum(p.numel() for p in experts.values())
    return f"experts: {count:,} weights ({_kinds(experts)}) are 3-D parameters, which no adapter reaches{not_quantised}"


def _kinds(experts: dict[str, nn.Parameter]) -> str:
    return ", ".join(sorted({".".join(name.split(".")[-2:]) for name in experts}))


def _moved_to_experts(model: nn.Module, names: set[str]) -> set[str]:
    """Return those of some names that stock PEFT takes for the experts', whatever linear layers bear them: before
    transformers 5, experts were linear layers of the names that dense and shared ones have."""
    if not expert_parameters(model):
        return set()
    return {name for name in names if is_moved_to_experts(model, name)}


def _no_such_module(model: nn.Module, name: str, linear: Counter[str]) -> ConfigError:
    listed = ", ".join(f"{n} (×{c})" for n, c in sorted(linear.items()))
    experts = expert_parameters(model)
    also = f"; its experts ({_kinds(experts)}) are 3-D parameters, which no adapter reaches" if experts else ""
    return ConfigError(
        "method.target_modules",
        value=name,
        reason=f"takes no adapters in {type(model).__name__}, whose linear layers are {listed}{also}",
        hint="method.target_modules=all_linear, or a list of these",
    )
