"""A finished run put to use: score it again, answer a prompt. One process, no DeepSpeed."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from trainer import distributed
from trainer.card import model_card
from trainer.config import TrainConfig, load
from trainer.config.method import MethodConfig
from trainer.config.parts import is_template_file
from trainer.data.batches import Limits
from trainer.data.load import load_data
from trainer.data.micro import MicroBatch
from trainer.data.packing import Packing
from trainer.data.templates import Template
from trainer.errors import CheckpointError, DataError
from trainer.evaluate import evaluate
from trainer.fetch import resolve
from trainer.generate import Sampler
from trainer.loss import LabelLoss
from trainer.merge import Merged, answers, check_mergeable, merge
from trainer.methods import is_adapter, load_adapter
from trainer.model import compute_dtype, load_model, load_tokenizer
from trainer.quiet import quiet

MERGE_ROWS, MERGE_TOKENS = 16, 256  # rows of the run's data that a merge is proved on, and how much of each


@dataclass(slots=True)
class Loaded:
    """A run's model, ready for inference, and what it was trained with."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    world: distributed.World


def load_run(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    adapter: bool = True,
    bits: int | None = None,
    device_map: str | None = None,
) -> Loaded:
    """The base model of a run with its final adapter, or its fully trained model.

    Args:
        run: a run folder.
        overrides: laid over the run's own config.yaml.
        adapter: without it the base model answers as it was before training.
        bits: hold the base in so many bits; ``None``: as in training.
        device_map: handed to transformers (``auto`` spreads the base over the devices); ``None``: one device.

    Raises:
        CheckpointError: the run has no final adapter or model.
    """
    quiet()
    own_template = _own_template(run)
    config = load([*own_template, *overrides], run / "config.yaml")
    world = distributed.from_environment()
    method = dataclasses.replace(config.method, bits=config.method.bits if bits is None else bits)
    dtype = compute_dtype(config.model.dtype, world.device, zero_stage=2)
    is_full = config.method.name == "full"
    folder = str(run / "model") if is_full and adapter else resolve(config.model.name_or_path, config.model.revision)
    trained = run / ("model" if is_full else "adapter")
    if adapter and not (trained / "config.json").exists() and not is_adapter(trained):
        raise CheckpointError(str(trained), rule="is not there: the run has not finished", cure="train it to its end")
    keys = dataclasses.replace(config.model, revision=None) if is_full else config.model
    model: Any = load_model(folder, keys, method, dtype, world.device, zero_stage=0, device_map=device_map)
    if adapter and not is_full:
        model = load_adapter(model, trained)
    if device_map is None and method.bits == 16:
        model = model.to(world.device)
    tokenizer = load_tokenizer(str(trained) if adapter or own_template else folder, keys)
    return Loaded(config, model.eval(), tokenizer, world)


def _own_template(run: Path) -> list[str]:
    """What to override when a finished run was trained with a chat template from a file: the tokenizer that it saved
    carries that template, so the file may be gone by now."""
    config = OmegaConf.load(run / "config.yaml")
    saved = any((run / name / "tokenizer_config.json").exists() for name in ("adapter", "model"))
    return ["data.template=chat"] if saved and is_template_file(OmegaConf.select(config, "data.template")) else []


class Bare:
    """A model without DeepSpeed, to be scored."""

    def __init__(self, model: Any) -> None:
        self.model, self.loss = model, LabelLoss(model)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Summed cross-entropy of one micro-batch."""
        return self.loss(self.model, batch)

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Logits at its label positions, (labels, vocabulary)."""
        return self.loss.logits(self.model, batch)


def evaluate_run(run: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Score a run's final model on its held-out rows by ``eval.metrics``; the metrics, flat."""
    loaded = load_run(run, overrides)
    config, world = loaded.config, loaded.world
    data = load_data(config, loaded.tokenizer, print)
    if not len(data.validation):
        raise DataError(
            "data.validation",
            value=config.data.validation,
            rule="holds out no row to score",
            cure="data.validation=0.1",
        )
    sampler = Sampler(loaded.model, loaded.tokenizer, config.generate, data.end_ids, world.device)
    packing = Packing(False, Limits(config.batch.micro_size, config.batch.micro_tokens), sampler.pad_id)
    distributed.init(world)
    try:
        return evaluate(Bare(loaded.model), sampler, packing, data, config, world).metrics
    finally:
        distributed.shutdown()


def merge_run(run: Path, to: Path, overrides: Sequence[str] = ()) -> Merged:
    """Merge a run's adapter into its base, in 16 bits (or as ``model.dtype`` says), and prove it.

    Args:
        run: a finished run's folder.
        to: the plain Hugging Face folder that is made.
        overrides: laid over the run's own config.yaml.

    Raises:
        CheckpointError: the method cannot be merged, the run has no adapter, or the merged model answers otherwise.
    """
    config = load([*_own_template(run), *overrides], run / "config.yaml")
    check_mergeable(config)
    tokenizer = load_tokenizer(str(run / "adapter"), config.model)
    prompts = _prompts(config, tokenizer)
    trained = None
    if config.method.bits < 16:
        quantised = load_run(run, overrides)
        trained = answers(quantised.model, prompts)
        del quantised
        gc.collect()
    summary = json.loads((run / "summary.json").read_text())
    device = distributed.from_environment().device

    def reload(folder: Path, dtype: torch.dtype) -> Any:
        keys = dataclasses.replace(config.model, revision=None)
        return load_model(str(folder), keys, MethodConfig(name="full"), dtype, device, zero_stage=0).eval().to(device)

    return merge(
        lambda: load_run(run, overrides, bits=16).model,
        tokenizer,
        prompts,
        to,
        reload,
        lambda result: model_card(config, summary, result),
        trained,
    )


def _prompts(config: TrainConfig, tokenizer: Any) -> list[list[int]]:
    """Rows of the run's own data, held-out ones first."""
    data = load_data(config, tokenizer, lambda _: None)
    rows = data.validation if len(data.validation) else data.train
    return [tokens.ids[:MERGE_TOKENS].tolist() for tokens in rows.tokens(range(min(MERGE_ROWS, len(rows))))]


def generate_run(
    run: Path,
    prompt: str,
    *,
    input: str = "",
    adapter: bool = True,
    bits: int | None = None,
    device_map: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Answer one prompt, laid out as in training.

    Args:
        run: a run folder.
        prompt: the instruction.
        input: what the instruction is about, as in an Alpaca row.
        adapter, bits, device_map, overrides: as in :func:`load_run`.
    """
    loaded = load_run(run, overrides, adapter=adapter, bits=bits, device_map=device_map)
    config = loaded.config
    template = Template(loaded.tokenizer, config.data.template, config.data.alpaca_role, config.data.train_on)
    device = loaded.model.device
    torch.manual_seed(config.run.seed)
    sampler = Sampler(loaded.model, loaded.tokenizer, config.generate, template.end_ids(), device)
    return sampler.decode(sampler.answer([template.encode_prompt(prompt, input)])[0]).strip()
