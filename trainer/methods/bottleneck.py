"""Attach, save and read bottleneck adapters (Houlsby et al., 2019; Pfeiffer et al., 2020), which PEFT does not have.

``y -> y + up(activation(down(y)))`` behind the last projection of each attention and MLP (houlsby) or of each MLP
(pfeiffer). ``up`` starts at zero, so the model starts as it was. Saved as safetensors and JSON under the names that a
PEFT adapter's files have, with ``peft_type`` BOTTLENECK, which tells both apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.config.method import MethodConfig, given
from trainer.errors import ConfigError
from trainer.methods.targets import check_layers, ends_in, expert_parameters, layer_index
from trainer.methods.text_part import text_modules

BOTTLENECK_TYPE = "BOTTLENECK"
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
# The last projection of attention and of the MLP, by architecture.
ATTENTION_ENDS = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attention.dense", "attn.c_proj"),
    *("self_attention.dense", "attn.out_proj", "attention.out_proj"),
)
MLP_ENDS = (
    *("mlp.down_proj", "mlp.fc2", "mlp.dense_4h_to_h", "mlp.c_proj", "fc2", "mlp.fc_out", "ffn.down_proj"),
    *("feed_forward.down_proj", "feed_forward.w2", "shared_mlp.output_linear"),
)


class Bottleneck(nn.Module):
    """A frozen layer with an adapter behind it.

    Args:
        base_layer: whose output, (…, width), is adapted.
        width: of that output.
        inner_width: width between the adapter's two layers.
        activation: a key of ``ACTIVATIONS``.
        dtype, device: of the adapter.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        width: int,
        inner_width: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base_layer, self.width, self.inner_width = base_layer, width, inner_width
        self.down = nn.Linear(width, inner_width, dtype=dtype, device=device)
        self.up = nn.Linear(inner_width, width, dtype=dtype, device=device)
        self.activation = ACTIVATIONS[activation]()
        nn.init.normal_(self.down.weight, std=1e-2)  # as in Houlsby et al.: near the identity
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output, adapted."""
        out = self.base_layer(*args, **kwargs)
        return out + self.up(self.activation(self.down(out)))


def attach_bottleneck(model: nn.Module, method: MethodConfig) -> nn.Module:
    """Freeze the model and insert adapters; random numbers come from torch's global generator.

    Raises:
        ConfigError: no projection of the model is known by its name, or it has fewer layers.
    """
    factor, activation = given(method.reduction_factor), given(method.activation)
    model.requires_grad_(False)
    layers = check_layers(model, method.layers)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for full, base in find_projections(model, given(method.placement), layers):
        width = base.out_features if hasattr(base, "out_features") else base.nf
        if width // factor < 1:
            reason = f"leaves nothing of a width of {width}"
            raise ConfigError("method.reduction_factor", value=factor, reason=reason, hint="a smaller one")
        parent, _, name = full.rpartition(".")
        device = next(base.parameters()).device
        adapter = Bottleneck(base, width, width // factor, activation, dtype, device)
        setattr(model.get_submodule(parent), name, adapter)
    return model


def find_projections(model: nn.Module, placement: str, layers: list[int] | None) -> list[tuple[str, Any]]:
    """Return the projections that get an adapter behind them, with their full names."""
    kinds = (MLP_ENDS,) if placement == "pfeiffer" else (ATTENTION_ENDS, MLP_ENDS)
    found: list[tuple[str, Any]] = []
    for ends in kinds:
        matches = [(full, m) for full, m in text_modules(model) if any(ends_in(full, end) for end in ends)]
        if not matches:
            experts = " (its experts are 3-D parameters, which have no layer to stand behind)"
            raise ConfigError(
                "method.placement",
                value=placement,
                reason=f"finds none of {', '.join(ends)} in {type(model).__name__}"
                + (experts if expert_parameters(model) else ""),
                hint="method=lora works on any linear layer",
            )
        found += matches
    if layers is None:
        return found
    return [(full, m) for full, m in found if layer_index(full) in layers]


def save_bottleneck(model: Any, folder: Path, weights: dict[str, Tensor], base: str | None = None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    Args:
        model: with the adapters.
        folder: where to.
        weights: whole tensors of the trainable parameters by their names in ``model``.
        base: what the base is called; ``None``: by where it was loaded from.
    """
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    base = model.config.name_or_path if base is None else base
    metadata = {"peft_type": BOTTLENECK_TYPE, "base_model_name_or_path": base, **bottleneck_metadata(model)}
    (folder / "adapter_config.json").write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")


def bottleneck_metadata(model: Any) -> dict[str, Any]:
    """Return the settings that a model's adapters were made with, read off the adapters."""
    adapters = {full: module for full, module in model.named_modules() if isinstance(module, Bottleneck)}
    one = next(iter(adapters.values()))
    layers = sorted({number for full in adapters if (number := layer_index(full)) is not None})
    return {
        "reduction_factor": one.width // one.inner_width,
        "placement": "houlsby" if any(f.endswith(ATTENTION_ENDS) for f in adapters) else "pfeiffer",
        "activation": next(name for name, kind in ACTIVATIONS.items() if isinstance(one.activation, kind)),
        "layers": None if len(layers) == model.config.get_text_config().num_hidden_layers else layers,
    }


def parse_bottleneck_config(metadata: dict[str, Any]) -> MethodConfig:
    """Build the ``method`` group that a saved adapter was made with.

    Raises:
        KeyError: the metadata is not an adapter's.
    """
    names = ("reduction_factor", "placement", "activation", "layers")
    return MethodConfig(name="bottleneck", **{name: metadata[name] for name in names})
