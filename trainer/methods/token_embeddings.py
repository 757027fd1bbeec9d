"""Train embeddings beside LoRA: the rows of some tokens (PEFT's trainable tokens), or modules whole.

The output layer takes part in both: tied to the input it stays tied, else its rows of the same tokens are trained too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.compat.peft import unwrapped
from trainer.config.messages import config_error
from trainer.config.method import MethodConfig
from trainer.config.new_tokens import new_tokens
from trainer.config.rules.tokens import NEW
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.methods.targets import ends_in

TOKENS, MODULES = "method.trainable_tokens", "method.modules_to_save"


def trainable_token_ids(config: TrainConfig, tokenizer: Any) -> list[int]:
    """Return the ids of ``method.trainable_tokens``, rising; empty where there are none.

    Raises:
        ConfigError: a token is none of the tokenizer's.
    """
    wanted = config.method.trainable_tokens
    if wanted is None:
        return []
    known = tokenizer.get_vocab()
    for token in wanted if wanted != NEW else ():
        if token not in known:
            hint = f"a token as the tokenizer spells it, or one that model.new_tokens adds; {TOKENS}={NEW} means those"
            raise ConfigError(TOKENS, value=token, reason="is none of this tokenizer's tokens", hint=hint)
    return sorted(known[token] for token in (new_tokens(config.model) if wanted == NEW else wanted))


def add_embeddings(peft: Any, model: Any, method: MethodConfig, token_ids: list[int]) -> None:
    """Write into a LoraConfig which embeddings and modules are trained beside its adapters.

    Args:
        peft: of this model, changed in place.
        model: the base model.
        method: the ``method`` group.
        token_ids: of ``method.trainable_tokens``.

    Raises:
        ConfigError: a module does not exist, or would be trained in two ways.
    """
    tied = is_tied(model)
    if method.modules_to_save is not None:
        _check_modules(model, method.modules_to_save)
        peft.modules_to_save = list(method.modules_to_save)
        if tied and any(ends_with(name, peft.modules_to_save) for name in embedding_names(model)):
            peft.ensure_weight_tying, peft.modules_to_tie, peft.target_modules_to_tie = True, None, None
    names = embedding_names(model)[: 1 if tied else 2] if token_ids else []
    if names:
        peft.trainable_token_indices = {name: list(token_ids) for name in names}
    for key, others in ((MODULES, peft.modules_to_save or []), ("method.target_modules", peft.target_modules)):
        if both := [name for name in (embedding_names(model) if names else []) if ends_with(name, others)]:
            reason = f"are rows of {both[0]}, which {key} has trained as well"
            raise ConfigError(
                TOKENS, value=method.trainable_tokens, reason=reason, hint=f"{TOKENS}=null, or leave it out"
            )


def trained_ids(indices: Any) -> list[int]:
    """Return the ids in a LoraConfig's ``trainable_token_indices``, rising: a list of them, or one for each layer."""
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    return sorted({int(number) for some in lists for number in some})


def embedding_names(model: Any) -> list[str]:
    """Return the full names of the input embedding and of the output layer, where the model has one."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in wanted if module is not None]


def is_tied(model: Any) -> bool:
    """Return whether the output layer has the weights of the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def ends_with(full: str, names: Any) -> bool:
    """Return whether a module of this full name is one of those that PEFT takes some names for."""
    return not isinstance(names, str) and any(ends_in(full, name) for name in names)


def _check_modules(model: nn.Module, names: list[str]) -> None:
    every = [full for full, _ in model.named_modules() if full]
    for name in names:
        if not any(ends_with(full, [name]) for full in every):
            known = ", ".join(sorted({full.rpartition(".")[2] for full in every} - set(map(str, range(1000)))))
            reason = f"is no module of {type(model).__name__}, whose modules are called {known}"
            raise ConfigError(MODULES, value=name, reason=reason, hint=f"{MODULES}=null, or the name of one")


def check_embeddings(model: Any, was_tied: bool, method: MethodConfig) -> None:
    """Compare what PEFT has put around the embeddings with what they were.

    Args:
        model: with fresh adapters attached.
        was_tied: of the base.
        method: the ``method`` group.

    Raises:
        ConfigError: tied weights would part, or PEFT's form of a layer does not do what the layer does (a bias of the
            output layer that it leaves out).
    """
    trained = [set(some) for some in _trained_parameters(model)]
    if was_tied and any(trained) and trained[0] != trained[1]:
        reason = f"would part the output layer of {type(model.get_base_model()).__name__} from the input (peft 0.21)"
        raise _not_these(method, reason, TOKENS)
    for layer in _embeddings(model):
        if (base := unwrapped(layer)) is not None and not _do_the_same(layer, base):
            reason = f"would change what {type(base).__name__} does before it is trained (a bias or scale of its own)"
            raise _not_these(method, reason, f"{MODULES} trains it whole")


def check_new_rows(model: Any, method: MethodConfig) -> None:
    """Refuse new tokens whose rows nothing trains, in the input or in the output.

    Args:
        model: with adapters attached.
        method: the ``method`` group; new tokens are among ``trainable_tokens`` where there are any.

    Raises:
        ConfigError: it is so.
    """
    for which, trained in zip(("input", "output"), _trained_parameters(model), strict=False):
        if not trained:
            reason = f"leaves the {which} embeddings of new tokens as they start: nothing trains them"
            raise _not_these(method, reason, f"{TOKENS}={NEW}, or both embeddings in {MODULES}")


def _embeddings(model: Any) -> list[nn.Module]:
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]


def _trained_parameters(model: Any) -> list[list[int]]:
    """Return which parameters are trained in the input embeddings and in the output layer."""
    return [[id(p) for p in layer.parameters() if p.requires_grad] for layer in _embeddings(model)]


def _not_these(method: MethodConfig, reason: str, hint: str) -> ConfigError:
    key, value = (
        (MODULES, method.modules_to_save) if method.trainable_tokens is None else (TOKENS, method.trainable_tokens)
    )
    return config_error(key, value, reason, hint)


def _do_the_same(layer: Any, base: Any) -> bool:
    """Return whether a layer as PEFT has wrapped it and the layer itself do the same, untrained."""
    weight = base.weight
    with torch.no_grad():
        if isinstance(base, nn.Embedding):
            probe: Tensor = torch.arange(min(8, len(weight)), device=weight.device)
        else:
            draw = torch.Generator().manual_seed(0)
            probe = torch.randn(2, weight.shape[-1], generator=draw).to(weight)
        return torch.equal(layer(probe), base(probe))
