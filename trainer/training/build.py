"""Build what a run trains: the base with its adapters, the packing, the DeepSpeed engine."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.config.method import initial_seed
from trainer.config.new_tokens import new_tokens
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Data
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.device import give_back_memory
from trainer.engine.engine import Engine
from trainer.engine.kernel_set import KernelSet, limit_sdpa, wanted_kernels
from trainer.engine.meter import Meter
from trainer.engine.optimizers import check_device
from trainer.engine.state_bytes import state_bytes
from trainer.engine.verify_kernels import Choice, choose_packing_and_kernels
from trainer.engine.whole_state import EngineTensors
from trainer.errors import ConfigError
from trainer.evaluation.multiple_choice import letter_tokens
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach, count_parameters, create_runtime
from trainer.methods.target_parameters import describe_unreached
from trainer.methods.targets import adapted_modules, describe_left_out
from trainer.methods.text_part import describe_frozen_parts
from trainer.methods.token_embeddings import check_new_rows, trainable_token_ids
from trainer.methods.warm_start import check_same_tokens
from trainer.models.identity import describe_base
from trainer.models.loading import compute_dtype, load_model
from trainer.models.new_tokens import check_vocabulary
from trainer.models.positions import learned_positions, trained_positions
from trainer.tracking.counter import ProgressCounter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Built:
    """What a run trains.

    Attributes:
        engine: the model under DeepSpeed, with the method's runtime.
        packing: how examples share a forward.
        model_info: numbers and words about them, for the log and W&B.
        meter: of what a step costs.
    """

    engine: Engine
    packing: Packing
    model_info: dict[str, Any]
    meter: Meter


def build(config: TrainConfig, world: World, base_dir: str, data: Data, tokenizer: Any) -> Built:
    """Load the base, attach what is trained, choose the packing, hand it to DeepSpeed. The process group must be up.

    Args:
        config: the whole configuration.
        world: this process.
        base_dir: the base model's local folder or hub id.
        data: the first step's rows are what the packing is verified on.
        tokenizer: of the base.

    Raises:
        ConfigError: something that was asked for is not possible with this model or data.
        ModelError: the base cannot be loaded.
    """
    method = config.method
    check_device(config.optim, world.device)
    dtype = compute_dtype(config.model.dtype, world.device, config.zero.stage)
    base = load_model(base_dir, config.model, method, dtype, world.device, config.zero.stage)
    check_rows(base, data, config)
    check_vocabulary(base, tokenizer)
    model = _attach(base, config, data, tokenizer)
    runtime = create_runtime(model, method)
    if world.is_main and not runtime.trains_base_weights:
        runtime.base = describe_base(config.model, base_dir)
    model = place(model, config, world)
    loss = LabelLoss(model)
    choice = choose(model, loss, config, data, tokenizer.pad_token_id, world, dtype)
    experts = None if runtime.trains_base_weights else describe_unreached(base, method)
    meter = Meter(world, model, dtype)
    state = state_bytes(model, config, dtype, world.world_size, not runtime.trains_base_weights)
    model_info = {
        **_count(model),
        **describe_choice(choice, meter, dtype, world),
        "experts": experts,
        "left_out": None if runtime.trains_base_weights else describe_left_out(base, method),
        "frozen_parts": describe_frozen_parts(base),
        "state_bytes": state,
        "targets": adapted_modules(model),
    }
    with ProgressCounter("starting DeepSpeed"):
        engine = Engine(
            model=model,
            loss=loss,
            config=config,
            world=world,
            dtype=dtype,
            runtime=runtime,
            reads_adapters="lora" in choice.kernels,
        )
    runtime.bind(EngineTensors(engine))
    return Built(engine, choice.packing, model_info, meter)


def _attach(base: Any, config: TrainConfig, data: Data, tokenizer: Any) -> Any:
    method, new = config.method, list(new_tokens(config.model))
    text = tokenizer(method.init_text, add_special_tokens=False)["input_ids"] if method.init_text else None
    token_ids = trainable_token_ids(config, tokenizer)
    if method.adapter is not None:
        check_same_tokens(tokenizer, token_ids, Path(method.adapter))
    warn_of_unseen(data, tokenizer, new)
    seed, total_steps = initial_seed(method, config.run.seed), data.total_steps(config.batch)
    model = attach(base, method, seed, total_steps, text, token_ids)
    if new:
        check_new_rows(model, method)
    return model


def warn_of_unseen(data: Data, tokenizer: Any, tokens: list[str]) -> None:
    """Warn of new tokens that no row has: the input's row of such a token is not trained, the output's away from it."""
    known = {int(tokenizer.convert_tokens_to_ids(token)): token for token in tokens}
    if unseen := [known[number] for number in data.train.unseen(list(known))]:
        parse = (
            "; data.control_tokens=parse reads control tokens that stand in rows" if unseen[0].startswith("<|") else ""
        )
        logger.warning(f"model.new_tokens: no row has {', '.join(unseen)}, so nothing is learned about it{parse}")


def check_rows(base: nn.Module, data: Data, config: TrainConfig) -> None:
    """Refuse rows longer than a table of learned positions, and held-out rows without a choice where choices are
    scored: an error now, not after the first hours. Warn of rows longer than what a model was made for."""
    if "choice_accuracy" in config.eval.metrics:
        letter_tokens(data.validation)
    limit, trained = learned_positions(base), trained_positions(base)
    for rows in (data.train, data.validation):
        if not len(rows) or trained is None or (longest := int(rows.lengths.max())) <= trained:
            continue
        (name,) = rows.names([int(rows.lengths.argmax())])
        if limit is not None:
            raise ConfigError(
                name, reason=f"has {longest} tokens, and the model {limit} positions", hint=f"data.max_length={limit}"
            )
        logger.warning(
            f"{name} has {longest} tokens, and the model was made for {trained}: what lies behind may be learned badly"
        )


def place(model: Any, config: TrainConfig, world: World) -> Any:
    """Put a model with its adapters where DeepSpeed would, as far as that is known: its packing is verified where it
    will run."""
    is_whole = config.zero.stage < 3 and config.method.bits == 16
    return model.to(world.device) if world.device.type == "cuda" and is_whole else model


def choose(
    model: Any,
    loss: LabelLoss,
    config: TrainConfig,
    data: Data,
    pad_id: int,
    world: World,
    dtype: torch.dtype,
    without: Collection[str] = (),
) -> Choice:
    """Choose the packing and the kernels on the loaded model, put these into it, and take all others out. A collective.

    Args:
        model, loss, config, data, pad_id: as :func:`choose_packing_and_kernels` takes them.
        world: this process.
        dtype: of forward and backward.
        without: kernels that are not looked at.
    """
    if config.model.kernels != "none":
        limit_sdpa(world.device)
    wanted = tuple(name for name in wanted_kernels(config, model, world.device, dtype) if name not in without)
    kernels = KernelSet(model, wanted)
    found = choose_packing_and_kernels(model, loss, config, data, pad_id, kernels, world.device)
    # Rank 0's finding counts: hosts of unlike hardware must not choose unlike packings.
    choice = distributed.from_main(found)
    kernels.use(choice.kernels)
    give_back_memory(world.device)
    return choice


def describe_choice(choice: Choice, meter: Meter, dtype: torch.dtype, world: World) -> dict[str, Any]:
    """Return what ``Built.model_info`` says of the devices and of what was chosen."""
    return {
        "world_size": world.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "peak_flops": meter.peak.per_second,
        "peak_flops_source": meter.peak.source,
        "packing": choice.lines[0],
        "kernels": choice.lines[1:],
        "packing_taken": "trie" if choice.packing.uses_trie else "padded",
        "kernels_taken": list(choice.kernels),
    }


def _count(model: nn.Module) -> dict[str, Any]:
    """Count the parameters; before ZeRO partitions the model."""
    trainable, total = count_parameters(model)
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
    }
