"""Gather the trainable state as whole tensors, whatever ZeRO has made of it; and restore it, to the bit.

Names: ``weight/NAME`` (fp32 master), ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` (AdamW's moments), with ``NAME`` as in
the model. Every function here is a collective: all ranks call it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.compat import deepspeed as compat
from trainer.distributed.whole_tensor import whole, whole_shape
from trainer.engine.engine import Engine
from trainer.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_state(engine: Engine) -> dict[str, Tensor]:
    """Gather masters and moments of every trainable parameter, fp32 on the CPU; on rank 0 only, the others get an empty
    dict."""
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
            if engine.world.is_main:
                # the clone gives safetensors a tensor that shares memory with no other
                out[f"{kind}/{name}"] = held.detach().to("cpu", torch.float32, copy=True).contiguous()
    return out


def restore_state(engine: Engine, tensors: dict[str, Tensor], step: int) -> None:
    """Restore a gathered state, at any world size and ZeRO stage.

    Args:
        engine: freshly built.
        tensors: what :func:`gather_state` gave; read on rank 0 only.
        step: optimizer steps that were taken.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    if engine.world.is_main:
        _check(engine, tensors)
    _make_moments(engine, step)
    for name, parameter in engine.trainable_params.items():
        for kind in ("weight", *MOMENTS):
            value = _from_main(engine, tensors.get(f"{kind}/{name}"), whole_shape(parameter))
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


def _from_main(engine: Engine, value: Tensor | None, shape: torch.Size) -> Tensor:
    """Broadcast rank 0's tensor: the checkpoint's disk may be rank 0's own."""
    device = engine.world.device
    held = torch.empty(shape, dtype=torch.float32, device=device)
    if engine.world.is_main:
        assert value is not None
        held.copy_(value)
    dist.broadcast(held, src=0)
    return held


def _check(engine: Engine, tensors: dict[str, Tensor]) -> None:
    for name, parameter in engine.trainable_params.items():
        for kind in ("weight", *MOMENTS):
            found = tensors.get(f"{kind}/{name}")
            if found is None or found.shape != whole_shape(parameter):
                what = "is not in the checkpoint" if found is None else f"has shape {tuple(found.shape)}"
                raise CheckpointError(
                    f"{kind}/{name}",
                    reason=f"{what}; this run needs {tuple(whole_shape(parameter))}",
                    hint="resume with the method it was saved with, or checkpoint.resume=never",
                )
