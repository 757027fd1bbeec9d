"""Named sets of modules: attention_min, attention, all_linear, on any architecture that has them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

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


def target_names(model: nn.Module, wanted: Any) -> list[str]:
    """The endings of the names of the modules that get adapters, sorted.

    Args:
        model: the base model, also on the meta device.
        wanted: ``method.target_modules``: a set's name or a list of module names.

    Raises:
        ConfigError: a named module does not exist in this model or takes no adapter; the ones that do are listed.
    """
    linear = _linear_names(model)
    if wanted == "all_linear":
        return sorted(linear)
    if isinstance(wanted, str):
        for names in ATTENTION_MIN if wanted == "attention_min" else ATTENTION:
            if all(any(_is_linear(m) for m in _ending_in(model, name)) for name in names):
                return sorted(names)
        raise _no_such_module(model, wanted, linear)
    for name in wanted:
        found = _ending_in(model, name)
        if not found or not all(_is_linear(m) or isinstance(m, nn.Embedding) for m in found):
            raise _no_such_module(model, name, linear)
    return sorted(wanted)


def down_names(model: nn.Module, names: list[str]) -> list[str]:
    """Of some targets, those that are the MLP's last projection."""
    found = [name for name in names if name in DOWN]
    if "c_proj" in found:  # in GPT-2 attention has a c_proj too: only the MLP's is meant
        return [name for name in (*found, "mlp.c_proj") if name != "c_proj"]
    return found


def layers_of(model: nn.Module, layers: list[int] | None) -> list[int] | None:
    """``method.layers``, checked against the model.

    Raises:
        ConfigError: the model has fewer layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    if layers is not None and max(layers) >= count:
        rule = f"{type(model).__name__} has {count} layers, numbered from 0 to {count - 1}"
        raise ConfigError("method.layers", value=layers, rule=rule, cure=f"numbers below {count}, or null for all")
    return layers


def layer_of(full: str) -> int | None:
    """The number of the layer that a module of this full name stands in."""
    return next((int(part) for part in full.split(".") if part.isdigit()), None)


def _ending_in(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that PEFT takes a target name for."""
    return [module for full, module in model.named_modules() if full == name or full.endswith(f".{name}")]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _linear_names(model: nn.Module) -> Counter[str]:
    """Last name parts of every linear layer but the output head, with how often each occurs."""
    head = model.get_output_embeddings()
    return Counter(
        name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module) and module is not head
    )


def _no_such_module(model: nn.Module, name: str, linear: Counter[str]) -> ConfigError:
    listed = ", ".join(f"{n} (×{c})" for n, c in sorted(linear.items()))
    return ConfigError(
        "method.target_modules",
        value=name,
        rule=f"takes no adapters in {type(model).__name__}, whose linear layers are {listed}",
        cure="method.target_modules=all_linear, or a list of these",
    )
