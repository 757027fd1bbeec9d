"""Gather the trainable state as whole tensors, whatever ZeRO has made of it; and restore it, to the bit.

Names: ``weight/NAME`` (fp32 master), and the optimizer's (``optimizer_state.py``: of AdamW ``exp_avg/NAME`` and
``exp_avg_sq/NAME``), with ``NAME`` as in the model. Every function here is a collective: all ranks call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.distributed.process_group import World, from_rank
from trainer.distributed.whole_tensor import whole, whole_shape
from trainer.engine.optimizer_state import AdamState, base_optimizer
from trainer.errors import CheckpointError
from trainer.methods import MethodRuntime


class StateOwner(Protocol):
    """What has the state of a run: its engine, or the view of one trial of several that share an engine."""

    @property
    def world(self) -> World:
        """This process."""

    @property
    def zero_stage(self) -> int:
        """0 to 3."""

    @property
    def dtype(self) -> torch.dtype:
        """Of forward and backward."""

    @property
    def model(self) -> nn.Module:
        """The model itself."""

    @property
    def runtime(self) -> MethodRuntime:
        """Of the method."""

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine."""

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, or the library's under stage 0."""

    @property
    def optimizer_state(self) -> AdamState:
        """What the optimizer holds, and under which names."""

    @property
    def trainable_params(self) -> Mapping[str, nn.Parameter]:
        """By the names that a run of its own gives them, in the model's order."""

    @property
    def shares(self) -> list[Tensor]:
        """What the optimizer holds of this rank's share of them: fp32, the keys of the moments."""

    @property
    def decays_all(self) -> bool:
        """Biases and norms decay as all else does."""


def assign_ranks(engine: StateOwner) -> dict[str, int]:
    """Assign each trainable parameter to the rank that writes or reads its state: adapters to rank 0, all weights
    evenly to all ranks. The same on every rank."""
    if not engine.runtime.trains_base_weights:
        return dict.fromkeys(engine.trainable_params, 0)
    held = [0] * engine.world.world_size
    ranks: dict[str, int] = {}
    for name, parameter in engine.trainable_params.items():
        ranks[name] = held.index(min(held))
        held[ranks[name]] += compat.whole_numel(parameter)
    return ranks


def gather_state(engine: StateOwner, ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Gather masters and moments of the trainable parameters, whole, fp32 on the CPU: each on one rank.

    Args:
        engine: of the state.
        ranks: which, by parameter (:func:`assign_ranks`); ``None``: rank 0 gets all, and the others an empty dict.
    """
    held_state, out = engine.optimizer_state, {}
    with held_state.readable(engine.optimizer, engine.zero_stage, engine.shares):
        for name, parameter in engine.trainable_params.items():
            wanted = engine.world.rank == (ranks[name] if ranks else 0)
            for kind in ("weight", *_shapes(engine, parameter)):
                held = _whole(engine, parameter, kind)
                assert held is not None, f"{kind} of {name} is not to be had under stage {engine.zero_stage}"
                if wanted:
                    # the clone gives safetensors a tensor that shares memory with no other
                    out[f"{kind}/{name}"] = held.detach().to("cpu", torch.float32, copy=True).contiguous()
    return out


def _shapes(engine: StateOwner, parameter: nn.Parameter) -> dict[str, torch.Size]:
    base = base_optimizer(engine.optimizer, engine.zero_stage)
    return engine.optimizer_state.shapes(base, parameter, whole_shape(parameter))


def _whole(engine: StateOwner, parameter: nn.Parameter, kind: str) -> Tensor | None:
    """Return the master of a parameter, or the whole tensor of this kind that the optimizer holds of it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    key = None if kind == "weight" else engine.optimizer_state.keys[kind]
    found: Tensor | None
    if engine.zero_stage == 0:
        found = parameter.detach() if key is None else engine.optimizer.state[parameter][key]
    elif key is None:
        found = safe_get_full_fp32_param(parameter)
    else:
        found = safe_get_full_optimizer_state(parameter, key)
    return found


def restore_state(engine: StateOwner, read: Callable[[str], Tensor | None], step: int) -> None:
    """Restore a gathered state, at any world size and ZeRO stage.

    Args:
        engine: of the state.
        read: returns a tensor of the checkpoint by its name, ``None`` where there is none; each name is read on one
            rank (:func:`assign_ranks`).
        step: optimizer steps that were taken.

    Raises:
        CheckpointError: a tensor is missing or has another shape; on every rank alike.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    held_state, optimizer, stage = engine.optimizer_state, engine.optimizer, engine.zero_stage
    held_state.reset(optimizer, stage, engine.shares, step)
    ranks = assign_ranks(engine)
    with held_state.writable(optimizer, stage, engine.shares):
        for name, parameter in engine.trainable_params.items():
            weight = _from_rank(engine, ranks[name], f"weight/{name}", read, whole_shape(parameter))
            _set_weight(engine, parameter, weight)
            for kind, shape in _shapes(engine, parameter).items():
                value = _from_rank(engine, ranks[name], f"{kind}/{name}", read, shape)
                if stage == 0:
                    optimizer.state[parameter][held_state.keys[kind]].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, held_state.keys[kind])


class EngineTensors:
    """The engine's trainable parameters as whole fp32 tensors by name, for a method's runtime.

    Args:
        engine: of these parameters.
    """

    def __init__(self, engine: StateOwner) -> None:
        self.engine, self.device = engine, engine.world.device

    def names(self) -> list[str]:
        """Names of the trainable parameters, in the model's order."""
        return list(self.engine.trainable_params)

    def shape(self, name: str) -> torch.Size:
        """Return the whole shape of a parameter."""
        return whole_shape(self.engine.trainable_params[name])

    def weight(self, name: str) -> Tensor:
        """Return the fp32 master of a parameter, whole, on every rank. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.engine.trainable_params[name]
        return parameter.detach() if self.engine.zero_stage == 0 else safe_get_full_fp32_param(parameter)

    def gradient(self, name: str) -> Tensor:
        """Return the reduced gradient of a parameter, fp32 and whole, on every rank; before the update, which clears
        it. It is neither clipped nor, in fp16, freed of the loss scale. A collective."""
        from deepspeed.utils import safe_get_full_grad

        parameter = self.engine.trainable_params[name]
        found = parameter.grad if self.engine.zero_stage == 0 else safe_get_full_grad(parameter)
        assert found is not None, "gradients are asked for between the backward and the update"
        return found.detach().to(torch.float32, copy=True)  # under stage 0 clipping scales the gradient in place

    def set_weight(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter: its master, and the copy that the forward uses. A collective."""
        _set_weight(self.engine, self.engine.trainable_params[name], value)


def _set_weight(engine: StateOwner, parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.zero_stage == 0:
        parameter.data.copy_(value.reshape(parameter.shape))
        return
    safe_set_full_fp32_param(parameter, value)
    _rewrite_live_copy(parameter, value)


def loss_scaler_state(engine: StateOwner) -> dict[str, Any]:
    """Return the fp16 loss scaler's numbers; empty in other dtypes."""
    return compat.loss_scaler_state(engine.optimizer) if engine.dtype == torch.float16 else {}


def restore_loss_scaler(engine: StateOwner, saved: dict[str, Any]) -> None:
    """Restore the loss scaler's numbers."""
    if saved:
        compat.restore_loss_scaler(engine.optimizer, saved)


def gather_live(engine: StateOwner, only_trainable: bool) -> dict[str, Tensor]:
    """Gather the tensors that the forward uses, whole, in their own dtype, on rank 0's CPU (the others: empty)."""
    out: dict[str, Tensor] = {}
    wanted = engine.trainable_params if only_trainable else dict(engine.model.named_parameters())
    for name, parameter in wanted.items():
        with whole(parameter):
            if engine.world.is_main:
                out[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return out


def _rewrite_live_copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Rewrite the forward's own copy; DeepSpeed would rewrite it from the master only at the next step."""
    with whole(parameter, modifier_rank=0):
        parameter.data.copy_(value.reshape(parameter.shape))


def _from_rank(
    engine: StateOwner, rank: int, name: str, read: Callable[[str], Tensor | None], shape: torch.Size
) -> Tensor:
    """Broadcast the tensor that one rank reads: the checkpoint's disk may be its own, and each byte is read once.

    What is wrong with it goes ahead of it, so that no rank waits for a tensor that does not come.
    """
    device, reason, value = engine.world.device, "", None
    if engine.world.rank == rank:
        value = read(name)
        if value is None or value.shape != shape:
            reason = "is not in the checkpoint" if value is None else f"has shape {tuple(value.shape)}"
    reason = from_rank(reason, rank)
    if reason:
        raise CheckpointError(
            name,
            reason=f"{reason}; this run needs {tuple(shape)}",
            hint="resume with the method and the optimizer it was saved with, or checkpoint.resume=never",
        )
    held = torch.empty(shape, dtype=torch.float32, device=device)
    if value is not None:
        held.copy_(value)
    dist.broadcast(held, src=rank)
    return held
