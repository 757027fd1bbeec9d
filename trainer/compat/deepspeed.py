"""DeepSpeed: what ZeRO has made of parameters and of the optimizer, and the build of an op that is not wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

from trainer.compat import has_changed, need, reach

LIBRARY = "deepspeed"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
SHM_OP = "deepspeed_shm_comm"
# What stage 3 puts on each module for its backward.
BACKWARD_FUNCTIONS = ("pre_bwd_fn", "post_bwd_fn")
# The fp32 shares of a rank, flat, by ZeRO stage.
FLAT_GROUPS = {
    1: "single_partition_of_fp32_groups",
    2: "single_partition_of_fp32_groups",
    3: "fp32_partitioned_groups_flat",
}


@reach(
    'deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]',
    upstream="https://github.com/deepspeedai/DeepSpeed/issues/7625",
    until="DeepSpeed has a switch for its shared-memory all-reduce, or builds it only for inference",
)
def skip_shm_build(on_cpu: bool) -> None:
    """Keep DeepSpeed from compiling a C++ op when it takes over a gloo group. Call it before ``init_distributed``.

    The op is for inference. Building it takes half a minute, and without a compiler or ninja it is an error.

    Args:
        on_cpu: DeepSpeed runs on its CPU accelerator; others do not have this op.

    Raises:
        LaunchError: DeepSpeed has no such op, so it would build what is called otherwise now.
    """
    import deepspeed

    need(LIBRARY, deepspeed.ops, "__compatible_ops__")
    ops = deepspeed.ops.__compatible_ops__
    if on_cpu and SHM_OP not in ops:
        raise has_changed(LIBRARY, f"there is no op {SHM_OP}")
    ops[SHM_OP] = False


def check_optimizer(optimizer: Any, zero_stage: int, fp16: bool) -> None:
    """Check, before a run is paid for, all that is asked of DeepSpeed's optimizer at its first update or at a resume.

    Args:
        optimizer: what ``deepspeed.initialize`` gave; stage 0 gives the plain one, of which nothing is needed.
        zero_stage: 0 to 3.
        fp16: the loss is scaled.

    Raises:
        LaunchError: an attribute is missing.
    """
    if zero_stage == 0:
        return
    need(LIBRARY, optimizer, "overflow", "optimizer", FLAT_GROUPS[zero_stage])
    if zero_stage < 3:
        need(LIBRARY, optimizer, "_lazy_init_hp_params_optimizer_state", "_hp_optimizer_states_linked")
    else:
        need(LIBRARY, optimizer, "checkpoint_event_epilogue")
    if fp16:
        need(LIBRARY, optimizer, "cur_scale", "loss_scaler")
        need(LIBRARY, optimizer.loss_scaler, "cur_scale")


@reach("optimizer.cur_scale", until="DeepSpeedEngine says the scale that the next backward uses")
def loss_scale(optimizer: Any) -> float:
    """Return the fp16 loss scale of a ZeRO optimizer.

    No default: gradients divided by a wrong scale would train on, wrongly.
    """
    return float(optimizer.cur_scale)


@reach("optimizer.loss_scaler", until="DeepSpeed saves and restores its loss scaler by itself, without a checkpoint")
def loss_scaler_state(optimizer: Any) -> dict[str, Any]:
    """Return the numbers of the fp16 loss scaler, as JSON can hold them; :func:`restore_loss_scaler` takes them."""
    return {k: v for k, v in vars(optimizer.loss_scaler).items() if isinstance(v, (int, float, bool))}


@reach("optimizer.loss_scaler", until="as loss_scaler_state")
def restore_loss_scaler(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put the numbers of :func:`loss_scaler_state` back."""
    for name, value in saved.items():
        setattr(optimizer.loss_scaler, name, value)


@reach(
    "optimizer.overflow",
    upstream="https://github.com/deepspeedai/DeepSpeed/issues/8415",
    until="DeepSpeedEngine.step says whether the step was taken",
)
def step_was_skipped(optimizer: Any) -> bool:
    """Return whether a ZeRO optimizer left its last step out for gradients that are not finite: it tells nobody."""
    return bool(optimizer.overflow)


@reach(
    "optimizer.check_overflow, ._overflow_check_and_loss_scale_update",
    until="DeepSpeedEngine can drop the gradients that it has accumulated",
)
@contextmanager
def overflowing(optimizer: Any, zero_stage: int) -> Iterator[None]:
    """Let a ZeRO optimizer find an overflow inside the ``with`` block: its step then drops all gradients, and no more.

    Args:
        optimizer: ZeRO's.
        zero_stage: 1, 2 or 3.
    """
    name = "check_overflow" if zero_stage < 3 else "_overflow_check_and_loss_scale_update"
    need(LIBRARY, optimizer, name, "check_grad_overflow" if zero_stage < 3 else "overflow")

    def overflows(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    checks = getattr(optimizer, "check_grad_overflow", None)
    setattr(optimizer, name, overflows)
    optimizer.check_grad_overflow = True
    try:
        yield
    finally:
        delattr(optimizer, name)
        optimizer.check_grad_overflow = checks


@reach(
    "deepspeed.runtime.fp16.loss_scaler, .zero.config.ZeroStageEnum, deepspeed.utils.tensor_fragment.fragment_address",
    until="no checkpoint of version 0.1 is left, or DeepSpeed reads its own with weights_only",
)
def load_checkpoint(engine: Any, folder: str, tag: str) -> None:
    """Load a checkpoint that DeepSpeed has saved, as data: a pickle that asks for more than tensors, plain values and
    the classes that DeepSpeed itself puts there is refused.

    Raises:
        pickle.UnpicklingError: a file asks for more.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(kind: Any, name: str) -> Any:  # for getattr, by which Python until 3.11.3 pickles members of enums
        if kind is ZeroStageEnum:
            return ZeroStageEnum[name]
        raise UnpicklingError(f"GLOBAL getattr of {kind}")

    forced = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"  # DeepSpeed asks for the opposite
    try:
        known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals([*known, (member, "builtins.getattr"), (member, "getattr")]):
            engine.load_checkpoint(folder, tag=tag)
    finally:
        if forced is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = forced


@reach(
    "engine.module_forward_pre_hook, .module_forward_post_hook, module.pre_bwd_fn, .post_bwd_fn",
    until="DeepSpeedEngine.destroy takes off the model all that it has put on it",
)
def detach(engine: Any, zero_stage: int) -> None:
    """Destroy DeepSpeed's engine and take its hooks off the model, which another engine can hold then.

    Under stage 3 each module would keep the functions of the first engine for its backward, and with them that engine's
    record of which parameters are where.

    Raises:
        LaunchError: an attribute is missing.
    """
    need(LIBRARY, engine, "module_forward_pre_hook", "module_forward_post_hook")
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()
    if zero_stage < 3:
        return
    need(LIBRARY, engine.module, *BACKWARD_FUNCTIONS)
    for module in engine.module.modules():
        for name in BACKWARD_FUNCTIONS:
            vars(module).pop(name, None)


@reach("parameter.ds_id", until="DeepSpeed has a public test for a partitioned parameter")
def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 has taken a parameter over; its own shape is (0,) between its uses then."""
    return hasattr(parameter, "ds_id")


@reach(
    "parameter.ds_shape", until="as is_partitioned; PEFT reads it too (https://github.com/huggingface/peft/pull/3576)"
)
def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter, also where ZeRO-3 has left a share of it on each rank."""
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


@reach("parameter.ds_numel", until="as is_partitioned")
def whole_numel(parameter: Any) -> int:
    """Return how many elements a parameter has, also where ZeRO-3 has left a share of it on each rank."""
    return int(parameter.ds_numel if is_partitioned(parameter) else parameter.numel())


@reach(
    "parameter.convert_to_zero_parameters",
    upstream="https://github.com/deepspeedai/DeepSpeed/issues/1142",
    until="zero.Init partitions a loaded model tensor by tensor, without all of it on the device",
)
def partition_like(partitioned: Any, parameter: Any) -> None:
    """Partition one more parameter, as ``zero.Init`` has partitioned ``partitioned``. A collective.

    A second ``zero.Init`` would start another numbering of parameters.
    """
    partitioned.convert_to_zero_parameters([parameter])


@reach("optimizer.optimizer", until="DeepSpeed documents it")
def base_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer inside a ZeRO optimizer: its parameters are this rank's flat fp32 shares."""
    return optimizer.optimizer


@reach(
    "optimizer.single_partition_of_fp32_groups, .fp32_partitioned_groups_flat",
    until="safe_set_full_optimizer_state works before the first step",
    upstream="https://github.com/deepspeedai/DeepSpeed/pull/5104",
)
def fp32_shares(optimizer: Any, zero_stage: int) -> list[Any]:
    """Return this rank's flat fp32 shares of the trained tensors, one a group: the keys of the moments.

    Args:
        optimizer: ZeRO's.
        zero_stage: 1, 2 or 3.
    """
    return list(getattr(optimizer, FLAT_GROUPS[zero_stage]))


@reach(
    "optimizer._lazy_init_hp_params_optimizer_state, ._hp_optimizer_states_linked",
    upstream="https://github.com/deepspeedai/DeepSpeed/pull/5104",
    until="safe_set_full_optimizer_state works before the first step",
)
def link_moments(optimizer: Any, zero_stage: int) -> None:
    """Let ``safe_set_full_optimizer_state`` find what the state holds now; stage 3 finds it by itself.

    Stages 1 and 2 link it to the parameters once, at the first step, and a resumed run sets moments before.
    """
    if zero_stage in (1, 2):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
