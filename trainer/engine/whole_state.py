"""Gather the trainable state as whole tensors, whatever ZeRO has made of it; and restore it, to the bit.

Names: ``weight/NAME`` (fp32 master), ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` (AdamW's moments), with ``NAME`` as in
the model. Every function here is a collective: all ranks call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.distributed.process_group import from_rank
from trainer.distributed.whole_tensor import whole, whole_shape
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def assign_ranks(engine: Engine) -> dict[str, int]:
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


def gather_state(engine: Engine, ranks: Mapping[str, int] | None = None) -> dict[str, Tensor]:
    """Gather masters and moments of the trainable parameters, whole, fp32 on the CPU: each on one rank.

    Args:
        engine: of the state.
        ranks: which, by parameter (:func:`assign_ranks`); ``None``: rank 0 gets all, and the others an empty dict.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    out: dict[str, Tensor] = {}
    for name, parameter in engine.trainable_params.items():
        for kind in ("weight", *MOMENTS):
            if engine.zero_stage == 0:
                held = parameter.detach() if kind == "weight" else engine.optimizer.state[parameter][kind]
            elif kind == "weight":
                held = safe_get_full_fp32_param(parameter)
            else:
                held = safe_get_full_optimizer_state(parameter, kind)
            assert held is not None, f"{kind} of {name} is not to be had under stage {engine.zero_stage}"
            if engine.world.rank == (ranks[name] if ranks else 0):
                # the clone gives safetensors a tensor that shares memory with no other
                out[f"{kind}/{name}"] = held.detach().to("cpu", torch.float32, copy=True).contiguous()
    return out


def restore_state(engine: Engine, read: Callable[[str], Tensor | None], step: int) -> None:
    """Restore a gathered state, at any world size and ZeRO stage.

    Args:
        engine: freshly built.
        read: returns a tensor of the checkpoint by its name, ``None`` where there is none; each name is read on one
            rank (:func:`assign_ranks`).
        step: optimizer steps that were taken.

    Raises:
        CheckpointError: a tensor is missing or has another shape; on every rank alike.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    _make_moments(engine, step)
    ranks = assign_ranks(engine)
    for name, parameter in engine.trainable_params.items():
        for kind in ("weight", *MOMENTS):
            value = _from_rank(engine, ranks[name], f"{kind}/{name}", read, whole_shape(parameter))
            if kind == "weight":
                _set_weight(engine, parameter, value)
            elif engine.zero_stage == 0:
                engine.optimizer.state[parameter][kind].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)


class EngineTensors:
    """The engine's trainable parameters as whole fp32 tensors by name, for a method's runtime.

    Args:
        engine: of these parameters.
    """

    def __init__(self, engine: Engine) -> None:
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


def _set_weight(engine: Engine, parameter: nn.Parameter, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.zero_stage == 0:
        parameter.data.copy_(value.reshape(parameter.shape))
        return
    safe_set_full_fp32_param(parameter, value)
    _rewrite_live_copy(parameter, value)


def _make_moments(engine: Engine, step: int) -> None:
    """Make AdamW's state as after ``step`` updates, moments zero: before the first update there is none to write to."""
    if engine.zero_stage == 0:
        adam, held = engine.optimizer, list(engine.trainable_params.values())
    else:
        adam, held = compat.base_optimizer(engine.optimizer), compat.fp32_shares(engine.optimizer, engine.zero_stage)
    for tensor in held:
        fused = bool(adam.param_groups[0].get("fused"))
        adam.state[tensor] = {
            "step": torch.tensor(float(step), device=tensor.device if fused else "cpu"),
            **{kind: torch.zeros_like(tensor, requires_grad=False) for kind in MOMENTS},
        }
    compat.link_moments(engine.optimizer, engine.zero_stage)


def loss_scaler_state(engine: Engine) -> dict[str, Any]:
    """Return the fp16 loss scaler's numbers; empty in other dtypes."""
    return compat.loss_scaler_state(engine.optimizer) if engine.dtype == torch.float16 else {}


def restore_loss_scaler(engine: Engine, saved: dict[str, Any]) -> None:
    """Restore the loss scaler's numbers."""
    if saved:
        compat.restore_loss_scaler(engine.optimizer, saved)


def gather_live(engine: Engine, only_trainable: bool) -> dict[str, Tensor]:
    """Gather the tensors that the forward uses, whole, in their own dtype, on rank 0's CPU (the others: empty)."""
    out: dict[str, Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        if only_trainable and name not in engine.trainable_params:
            continue
        with whole(parameter):
            if engine.world.is_main:
                out[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return out


def _rewrite_live_copy(parameter: nn.Parameter, value: Tensor) -> None:
    """Rewrite the forward's own copy; DeepSpeed would rewrite it from the master only at the next step."""
    with whole(parameter, modifier_rank=0):
        parameter.data.copy_(value.reshape(parameter.shape))


def _from_rank(engine: Engine, rank: int, name: str, read: Callable[[str], Tensor | None], shape: torch.Size) -> Tensor:
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
            hint="resume with the method it was saved with, or checkpoint.resume=never",
        )
    held = torch.empty(shape, dtype=torch.float32, device=device)
    if value is not None:
        held.copy_(value)
    dist.broadcast(held, src=rank)
    return held
