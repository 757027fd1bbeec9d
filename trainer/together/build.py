"""Build what a group trains: the base with an adapter a trial, the packing, one DeepSpeed engine."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from trainer.config import TrainConfig
from trainer.config.method import initial_seed
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Data
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.device import give_back_memory
from trainer.engine.engine import Engine
from trainer.engine.flops import ModelFlops, count_flops
from trainer.engine.meter import Meter
from trainer.engine.state_bytes import state_bytes
from trainer.errors import NotSharedError, TooManyTrialsError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.lora_linear import is_lora_linear
from trainer.kernels.patch import Patch
from trainer.kernels.shared_layers import share_lower_layers
from trainer.kernels.trial_lora import ActiveTrials, patch_trial_linears
from trainer.methods import count_parameters
from trainer.methods.attach import attach_trials
from trainer.methods.parameters import trial_parameters
from trainer.methods.target_parameters import describe_unreached
from trainer.methods.targets import describe_left_out
from trainer.methods.text_part import describe_frozen_parts
from trainer.models.first_layers import find_decoder_layers
from trainer.models.identity import describe_base
from trainer.models.loading import compute_dtype, load_model
from trainer.models.new_tokens import check_vocabulary
from trainer.together.engine import TrialsEngine
from trainer.together.trial_view import view_trial
from trainer.together.verify import verify_together
from trainer.tracking.counter import ProgressCounter
from trainer.tracking.result import size_text
from trainer.training.build import Built, check_rows, choose, describe_choice, place

STATE_SHARE = 0.8  # of a device's memory: the rest is for activations, which batch.micro_tokens bounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltTogether:
    """What a group trains.

    Attributes:
        engine: the base with all adapters, under DeepSpeed.
        packing: how the rows of one trial share a forward.
        meter: of what a step costs.
        trials: what each trial trains, as a run by itself sees it, by the name of its adapter.
    """

    engine: TrialsEngine
    packing: Packing
    meter: Meter
    trials: dict[str, Built]


def build_together(
    configs: Mapping[str, TrainConfig], world: World, base_dir: str, data: Data, tokenizer: Any
) -> BuiltTogether:
    """Load the base once, attach an adapter a trial, choose the packing, hand it all to DeepSpeed. A collective.

    Args:
        configs: the whole configuration of each trial, by the name of its adapter.
        world, base_dir, data, tokenizer: as :func:`trainer.training.build.build` takes them.

    Raises:
        TooManyTrialsError: they do not fit on a device.
        NotSharedError: these trials cannot share this model.
        ConfigError: something that was asked for is not possible with this model or data.
        ModelError: the base cannot be loaded.
    """
    config = next(iter(configs.values()))
    dtype = compute_dtype(config.model.dtype, world.device, config.zero.stage)
    model, flops, unreached = _load(configs, world, base_dir, data, dtype, tokenizer)
    state = state_bytes(model, config, dtype, world.world_size)
    check_room(len(configs), state, world.device)
    model = place(model, config, world)
    loss = LabelLoss(model)
    # LoRA's own kernel is for one adapter
    choice = choose(model, loss, config, data, tokenizer.pad_token_id, world, dtype, without=("lora",))
    active = _put_in_one_forward(model, loss, configs, data, choice.packing)
    meter = Meter(world, model, dtype, flops)
    common = {**describe_choice(choice, meter, dtype, world), "experts": unreached, "state_bytes": state}
    common["frozen_parts"] = describe_frozen_parts(model)
    common["kernels_taken"].append("lora")
    infos = {name: {**common, **own} for name, own in _describe_trials(model, configs).items()}
    for name, own in infos.items():
        own["left_out"] = describe_left_out(model, configs[name].method)
    with ProgressCounter("starting DeepSpeed"):
        engine = TrialsEngine(model=model, loss=loss, configs=configs, active=active, world=world, dtype=dtype)
    if world.is_main:
        described = describe_base(config.model, base_dir)
        for runtime in engine.runtimes.values():
            runtime.base = described
    # a view is what a run uses of its engine, but for updates, which are the group's
    trials = {
        name: Built(cast(Engine, view_trial(engine, name)), choice.packing, infos[name], meter) for name in configs
    }
    return BuiltTogether(engine, choice.packing, meter, trials)


def _load(
    configs: Mapping[str, TrainConfig], world: World, base_dir: str, data: Data, dtype: torch.dtype, tokenizer: Any
) -> tuple[PeftModel, ModelFlops, str | None]:
    """Load the base and attach the adapters; return the model, what a trial's tokens cost, and what is not adapted."""
    config = next(iter(configs.values()))
    if dtype == torch.float16:
        reason = "is fp16 on this device, whose loss scale is that of one run"
        raise NotSharedError("model.dtype", value=config.model.dtype, reason=reason, hint="sweep.fuse=off")
    base = load_model(base_dir, config.model, config.method, dtype, world.device, config.zero.stage)
    check_rows(base, data, config)
    check_vocabulary(base, tokenizer)
    plain, unreached = count_flops(base), describe_unreached(base, config.method)
    seeds = {name: initial_seed(own.method, own.run.seed) for name, own in configs.items()}
    model = attach_trials(base, {name: (own.method, seeds[name]) for name, own in configs.items()})
    _check_layers(model)
    counted = count_flops(model)
    # a token of a trial meets the base and that trial's adapter
    adapter = (counted.per_token - plain.per_token) / len(configs)
    return model, dataclasses.replace(counted, per_token=plain.per_token + adapter), unreached


def _put_in_one_forward(
    model: PeftModel, loss: LabelLoss, configs: Mapping[str, TrainConfig], data: Data, packing: Packing
) -> ActiveTrials:
    """Patch the layers for all trials at once, and verify them; return what says whose rows a forward has."""
    active = ActiveTrials(tuple(configs))
    patch, shared = patch_trial_linears(model, active), _share_lower_layers(model, active)
    assert patch is not None, "LoRA adapts linear layers"
    with ProgressCounter(f"verifying {len(configs)} trials in one forward"):
        config = next(iter(configs.values()))
        apart = distributed.from_main(verify_together(model, loss, config, data, packing, patch, active))
        if not apart.holds and shared is not None:  # layers that read more than their own rows
            logger.info(f"layers below the adapted ones are computed for each trial: shared, a trial differs ({apart})")
            shared.undo()
            apart = distributed.from_main(verify_together(model, loss, config, data, packing, patch, active))
    give_back_memory(next(model.parameters()).device)
    if not apart.holds:
        reason = f"is not possible with this model: beside one alone, a trial among all differs ({apart})"
        raise NotSharedError("sweep.fuse", value=len(configs), reason=reason, hint="sweep.fuse=off")
    return active


def _share_lower_layers(model: PeftModel, active: ActiveTrials) -> Patch | None:
    stack = find_decoder_layers(model)
    return share_lower_layers(model, *stack[:2], active) if stack else None


def device_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU; ``None`` of a CPU, whose memory is not a process's own."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_room(trials: int, state: int, device: torch.device) -> None:
    """Refuse trials that leave no memory for activations, beside their weights, gradients and optimizer."""
    room = device_bytes(device)
    if room is not None and state > STATE_SHARE * room:
        reason = f"takes {size_text(state)} for weights, gradients and optimizer, and a device has {size_text(room)}"
        raise TooManyTrialsError("sweep.fuse", value=trials, reason=reason, hint=f"sweep.fuse={max(1, trials // 2)}")


def _check_layers(model: Any) -> None:
    """Refuse adapters of layers that are not linear: their rows are not those of a trial."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not is_lora_linear(module):
            target, kind = name.rpartition(".")[2], type(module.get_base_layer()).__name__
            reason = f"adapts {target}, a layer of kind {kind}, which trials cannot share"
            raise NotSharedError("method.target_modules", value=target, reason=reason, hint="sweep.fuse=off")


def _describe_trials(model: Any, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Count the parameters of each trial as a run by itself does, and name its targets; before ZeRO partitions them."""
    adapters = {name: trial_parameters(model, name) for name in names}
    trained = {name: sum(p.numel() for p in own.values()) for name, own in adapters.items()}
    base = count_parameters(model)[1] - sum(trained.values())
    return {
        name: {
            "trainable_parameters": trained[name],
            "total_parameters": base + trained[name],
            "trainable_percent": 100 * trained[name] / (base + trained[name]),
            "targets": list(dict.fromkeys(layer.rpartition(".lora_")[0].rpartition(".")[2] for layer in own)),
        }
        for name, own in adapters.items()
    }
