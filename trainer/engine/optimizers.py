"""Make the optimizer: torch's, bitsandbytes' or transformers' own, over parameter groups."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trainer.compat.deepspeed import whole_shape
from trainer.config.optimizers import OPTIMIZERS
from trainer.config.schema import OptimConfig
from trainer.errors import ConfigError

USES_MUON = "uses_muon"


def make_optimizer(groups: Iterable[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer that ``optim.name`` asks for. Its rate is set before each step, so it starts at zero.

    Args:
        groups: of the trained parameters: ``params``, and what differs from ``optim`` in this group in the optimizer's
            own terms (``weight_decay``). Other keys are kept in ``param_groups`` for whoever reads them. Muon needs
            :func:`split_for_muon` of them.
        optim: betas, decay and the like.
    """
    groups = [dict(group) for group in groups]
    if optim.name == "adamw":
        return adamw(groups, optim)
    if optim.name == "adafactor":
        return _adafactor(groups, optim)
    if optim.name == "muon":
        return MuonWithAdamW(groups, optim)
    return _bitsandbytes(groups, optim)


def check_device(optim: OptimConfig, device: torch.device) -> None:
    """Raise a :class:`ConfigError` for an optimizer that this machine does not have, or cannot do as it is meant."""
    library = OPTIMIZERS[optim.name].library
    if importlib.util.find_spec(library) is None:  # bitsandbytes comes with Linux only
        hint = f"pip install {library}, or optim.name=adamw"
        raise ConfigError("optim.name", value=optim.name, reason=f"{library} has it, and is not installed", hint=hint)
    if optim.name == "paged_adamw_8bit" and device.type != "cuda":
        reason = f"pages lie in the memory of a GPU, and this runs on {device.type}"
        raise ConfigError("optim.name", value=optim.name, reason=reason, hint="optim.name=adamw_8bit")


def momentum(optim: OptimConfig) -> float:
    """Return ``optim.momentum``, or the authors' value where it is null."""
    found = OPTIMIZERS[optim.name].momentum if optim.momentum is None else optim.momentum
    assert found is not None, f"{optim.name} has no momentum"
    return found


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter, 2019) in its fused kernel, which makes no copies: on CPU an update takes an
    eighth of the time (20 million weights in fp32, 2 cores)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step. The kernel reads memory in its order: on CPU a gradient laid out unlike its weight would be
        that of other elements, in silence (torch 2.13)."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        return super().step(closure)


def adamw(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], optim: OptimConfig) -> FusedAdamW:
    """Make AdamW of parameters or groups of them."""
    return FusedAdamW(
        parameters,
        lr=0.0,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def _adafactor(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Make Adafactor (Shazeer & Stern, 2018) with the schedule's rate in place of its own, and no first moment."""
    from transformers import Adafactor

    return Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False, weight_decay=optim.weight_decay)


def _bitsandbytes(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Make AdamW with moments in 8 bits (Dettmers et al., 2022), or Lion (Chen et al., 2023)."""
    from bitsandbytes.optim import AdamW8bit, Lion, PagedAdamW8bit  # takes a second, so only where it is used

    if optim.name == "lion":
        return Lion(groups, lr=0.0, betas=(optim.beta1, momentum(optim)), weight_decay=optim.weight_decay)
    kind = PagedAdamW8bit if optim.name == "paged_adamw_8bit" else AdamW8bit
    return kind(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a matrix, and not a vector or a scale in a row or a column."""
    shape = whole_shape(parameter)
    return len(shape) == 2 and min(shape) > 1


def token_tables(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model's embeddings, of virtual tokens too, and of its head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [p for module in [*tables, *([] if head is None else [head])] for p in module.parameters()]


def split_for_muon(groups: Sequence[dict[str, Any]], embeddings: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Split groups into the matrices that Muon trains and what AdamW trains beside it (Jordan et al., 2024): vectors,
    scales in a row or a column, embeddings and the head.

    Args:
        groups: of the trained parameters.
        embeddings: the model's tables of tokens.

    Raises:
        ConfigError: there is no matrix.
    """
    tables = {id(table) for table in embeddings}

    out: list[dict[str, Any]] = []
    for group in groups:
        for uses_muon in (True, False):
            params = [p for p in group["params"] if (is_matrix(p) and id(p) not in tables) == uses_muon]
            out += [{**group, "params": params, USES_MUON: uses_muon}] if params else []
    if not any(group[USES_MUON] for group in out):
        raise ConfigError(
            "optim.name",
            value="muon",
            reason="this method trains no matrix between layers, and Muon is for those",
            hint="optim.name=adamw",
        )
    return out


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon for the groups with ``uses_muon``, torch's AdamW for the others, as its authors do.

    Muon's updates are scaled to the root mean square of AdamW's (Liu et al., 2025), so that both take one rate and
    decay.

    Args:
        groups: as :func:`split_for_muon` gives them.
        optim: momentum of Muon, betas of AdamW, decay of both.
    """

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        super().__init__(groups, {"lr": 0.0})
        matrices = [group for group in self.param_groups if group[USES_MUON]]
        others = [group for group in self.param_groups if not group[USES_MUON]]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=0.0,
                momentum=momentum(optim),
                weight_decay=optim.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others:
            self.parts.append(adamw(others, optim))
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step of both."""
        assert closure is None, "gradients are computed before"
        for part in self.parts:
            part.step()


class GroupwiseAdamW(FusedAdamW):
    """AdamW over parameter groups that clip, and skip a step, each on its own.

    Two settings a group beside AdamW's: ``takes_step``, whether the next :meth:`step` changes anything of it, and
    ``gradient_scale``, what its gradients are multiplied by before. Both are set by whoever knows the gradients.
    """

    def __init__(self, groups: Iterable[tuple[Iterable[nn.Parameter], OptimConfig]]) -> None:
        settings = [
            {
                "params": list(parameters),
                "betas": (optim.beta1, optim.beta2),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "takes_step": True,
                "gradient_scale": 1.0,
            }
            for parameters, optim in groups
        ]
        super().__init__(settings, lr=0.0, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients and take one step. A group that takes none loses its gradients, and nothing else."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not group["takes_step"]:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.mul_(group["gradient_scale"])
        return super().step(closure)
