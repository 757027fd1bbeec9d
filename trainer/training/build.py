"""Build what a run trains: the base with its adapters, the packing, the DeepSpeed engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig
from trainer.config.method import given
from trainer.data.batching.packing import Packing
from trainer.data.load import Data
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.engine import Engine
from trainer.engine.meter import Meter, give_back_memory
from trainer.engine.rank_allocation import Allocation
from trainer.engine.verify_trie import choose_packing
from trainer.evaluation.multiple_choice import letter_tokens
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import (
    OrthogonalTerm,
    attach,
    copy_initial_weights,
    count_parameters,
    digests,
    trainable_parameters,
)
from trainer.methods.targets import describe_unreached
from trainer.models.loading import compute_dtype, load_model


@dataclass(slots=True)
class Built:
    """A model under DeepSpeed, what is to be said of it, the meter of its cost, and what adapters started as."""

    engine: Engine
    allocation: Allocation | None
    packing: Packing
    facts: dict[str, Any]
    meter: Meter
    started: dict[str, str]


def build(config: TrainConfig, world: World, folder: str, data: Data, tokenizer: Any) -> Built:
    """Load the base, attach what is trained, choose the packing, hand it to DeepSpeed. The process group must be up."""
    dtype = compute_dtype(config.model.dtype, world.device, config.zero.stage)
    base = load_model(folder, config.model, config.method, dtype, world.device, config.zero.stage)
    if "choice_accuracy" in config.eval.metrics:
        letter_tokens(data.validation)  # said now, not after the first hours
    method, steps = config.method, data.total_steps(config.batch)
    text = tokenizer(method.init_text, add_special_tokens=False)["input_ids"] if method.init_text else None
    model = attach(base, method, config.run.seed, steps, text)
    started = digests(trainable_parameters(model)) if world.is_main and method.name != "full" else {}
    start = copy_initial_weights(model, method)
    orthogonal = OrthogonalTerm(model, given(method.orth_reg_weight)) if method.name == "adalora" else None
    if world.device.type == "cuda" and config.zero.stage < 3 and config.method.bits == 16:
        model = model.to(world.device)  # where DeepSpeed would put it; the packing is tried where it will run
    loss = LabelLoss(model)
    # Rank 0's finding counts: hosts of unlike hardware must not choose unlike packings.
    packing, why = distributed.from_main(choose_packing(model, loss, config, data, tokenizer.pad_token_id))
    give_back_memory(world.device)
    trained, total = count_parameters(model)
    facts = {
        "trainable_parameters": trained,
        "total_parameters": total,
        "trainable_percent": 100 * trained / total,
        "world_size": world.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "packing": why,
        "experts": describe_unreached(base, method.bits) if method.name != "full" else None,
    }
    meter = Meter(world, model, dtype)
    engine = Engine(model, loss, config, world, dtype, orthogonal, start)
    allocation = Allocation(engine) if method.name == "adalora" else None
    return Built(engine, allocation, packing, facts, meter, started)
