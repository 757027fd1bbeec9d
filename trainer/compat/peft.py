"""PEFT: layers and names inside its tuners that have no public way in."""

from __future__ import annotations

from typing import Any

from trainer.compat import need, reach

LIBRARY = "peft"


@reach("the parameter name ranknum", until="it is a buffer")
def is_rank_divisor(name: str) -> bool:
    """Return whether a parameter of this name is AdaLoRA's divisor, a constant.

    On a 16-bit base PEFT lets it be trained, and never saves it.
    """
    return ".ranknum." in name


@reach("peft.tuners.adalora.layer.AdaLoraLayer", until="peft exports it")
def adalora_layers(model: Any) -> list[Any]:
    """Return the layers with AdaLoRA's adapter."""
    from peft.tuners.adalora.layer import AdaLoraLayer

    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]


@reach("AdaLoraLayer.lora_A, .lora_B", until="as adalora_layers")
def adalora_factors(layer: Any) -> tuple[Any, Any]:
    """Return A, of (r, in), and B, of (out, r), of a layer with AdaLoRA's adapter.

    Looked up at each use: DeepSpeed may put other tensors there.
    """
    return layer.lora_A["default"], layer.lora_B["default"]


@reach(
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
    upstream="https://github.com/huggingface/peft/issues/3711",
    until="PEFT leaves target names alone that linear layers of the model bear",
)
def is_moved_to_experts(model: Any, name: str) -> bool:
    """Return whether PEFT takes a target name for the experts' of old, whatever linear layers bear it.

    Before transformers 5, experts were linear layers of the names that dense and shared ones have.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    probe = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(probe, model, None)
    except ValueError:  # it is one half of a pair that PEFT would move together
        return True
    return bool(probe.target_parameters)


@reach("peft.utils.other.AuxiliaryTrainingWrapper", until="PEFT documents it, as it does BaseTunerLayer")
def unwrapped(module: Any) -> Any | None:
    """Return the module that one of PEFT's layers was put around; ``None`` for any other module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else None


@reach(
    "base.peft_config, base.prepare_inputs_for_generation",
    until="PeftModel.unload leaves the base as it was, also for prompt methods and for an adapter put on in part",
)
def forget_wrapper(base: Any) -> None:
    """Remove what PEFT's wrapper has written on the base model itself."""
    for left in ("peft_config", "prepare_inputs_for_generation"):
        base.__dict__.pop(left, None)


@reach(
    "peft.tuners.lora.layer.ParamWrapper, ParamWrapper._activate_lora", until="ParamWrapper gives the adapted parameter"
)
def adapted_parameter_product(layer: Any, probe: Any) -> Any:
    """Return the products of an adapted parameter (experts, of three dimensions) with a probe.

    Such a parameter has no forward of its own: the adapter is added while a parametrisation is on.

    Args:
        layer: for which :func:`is_adapted_parameter` holds.
        probe: (width, columns).
    """
    need(LIBRARY, layer, "_activate_lora")
    with layer._activate_lora(layer.active_adapters):
        return getattr(layer.get_base_layer(), layer.parameter_name) @ probe


@reach("peft.tuners.lora.layer.ParamWrapper", until="peft exports it")
def is_adapted_parameter(layer: Any) -> bool:
    """Return whether a LoRA layer adapts a parameter and not a module (``target_parameters``)."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


@reach("TrainableTokensLayer.token_indices", until="peft documents it")
def trained_token_ids(layer: Any) -> list[int]:
    """Return the ids of the tokens whose rows of an embedding are trained; none for layers of other kinds."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    return list(layer.token_indices["default"]) if isinstance(layer, TrainableTokensLayer) else []


@reach("PeftModel.prompt_encoder, PeftModel.word_embeddings", until="prompt tuning starts from given token ids")
def prompt_start(model: Any) -> tuple[Any, Any]:
    """Return the trained embedding of prompt tuning and the base's word embeddings."""
    return model.prompt_encoder["default"].embedding, model.word_embeddings


@reach("the parameter names of PrefixEncoder and PromptEmbedding", until="PEFT saves prompts without its encoder")
def prompt_parameters(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a prompt's encoder by their names in it: ``embedding.weight``, ``transform.0.weight``.

    PEFT would run its encoder for it, which under ZeRO-3 is a collective, and only rank 0 saves.
    """
    return {name.partition("prompt_encoder.default.")[2]: tensor for name, tensor in weights.items()}
