"""A finished run put to use: score it again, answer a prompt, merge it. One process, no DeepSpeed."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.config.method import MethodConfig
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.load import load_data
from trainer.data.run_data import Data
from trainer.data.templates.template import Template
from trainer.distributed import process_group as distributed
from trainer.errors import DataError
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.generator import Generator
from trainer.inference.run_model import Loaded, load_run, run_config
from trainer.kernels.label_loss import LabelLoss
from trainer.merge.card import model_card
from trainer.merge.merge import MergeResult, check_mergeable, logits_at_positions, merge
from trainer.models.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)

MERGE_ROWS, MERGE_TOKENS = 16, 256  # rows of the run's data that a merge is proved on, and how much of each


class PlainScorer:
    """A model without DeepSpeed, to be scored."""

    def __init__(self, model: Any) -> None:
        self.model, self.loss = model, LabelLoss(model)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Summed cross-entropy of one micro-batch."""
        return self.loss(self.model, batch)

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Logits at its label positions, (labels, vocabulary)."""
        return self.loss.logits(self.model, batch)


def evaluate_run(run: Path, overrides: Sequence[str] = (), adapters: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Score a run's final model, and other adapters on its base, on the run's held-out rows by ``eval.metrics``.

    Args:
        run: a run folder.
        overrides: laid over the run's own config.yaml.
        adapters: as in :func:`~trainer.inference.run_model.load_run`.

    Returns:
        The metrics by the adapter's name, the run's own first.
    """
    loaded = load_run(run, overrides, adapters=adapters)
    for note in loaded.notes:
        logger.info(f"note: {note}")
    config, world = loaded.config, loaded.world
    data = load_data(config, loaded.tokenizer)
    if not len(data.validation):
        raise DataError(
            "data.validation",
            value=config.data.validation,
            reason="holds out no row to score",
            hint="data.validation=0.1",
        )
    distributed.init(world)
    try:
        return {name: _score(loaded, name, data) for name in loaded.asked}
    finally:
        distributed.shutdown()


def _score(loaded: Loaded, name: str, data: Data) -> dict[str, float]:
    """The metrics of one adapter; sampled answers do not depend on what was scored before."""
    config, model = loaded.config, loaded.switch.use(name)
    torch.manual_seed(config.run.seed)
    generator = Generator(model, loaded.tokenizer, config.generate, data.end_ids, loaded.world.device)
    packing = Packing(False, Limits(config.batch.micro_size, config.batch.micro_tokens), generator.pad_id)
    return evaluate(PlainScorer(model), generator, packing, data, config, loaded.world).metrics


def merge_run(run: Path, to: Path, overrides: Sequence[str] = ()) -> MergeResult:
    """Merge a run's adapter into its base, in 16 bits (or as ``model.dtype`` says), and prove it.

    Args:
        run: a finished run's folder.
        to: the plain Hugging Face folder that is made.
        overrides: laid over the run's own config.yaml.

    Raises:
        CheckpointError: the method cannot be merged, the run has no adapter, or the merged model answers otherwise.
    """
    config = run_config(run, overrides)
    check_mergeable(config)
    tokenizer = load_tokenizer(str(run / "adapter"), config.model)
    prompts = _prompts(config, tokenizer)
    reference_logits = None
    if config.method.bits < 16:
        quantised = load_run(run, overrides)
        reference_logits = logits_at_positions(quantised.model, prompts)
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
        reference_logits,
    )


def _prompts(config: TrainConfig, tokenizer: Any) -> list[list[int]]:
    """Rows of the run's own data, held-out ones first."""
    data = load_data(config, tokenizer)
    rows = data.validation if len(data.validation) else data.train
    return [tokens.ids[:MERGE_TOKENS].tolist() for tokens in rows.tokens(range(min(MERGE_ROWS, len(rows))))]


def generate_run(
    run: Path,
    prompt: str,
    *,
    input: str = "",
    adapter: bool = True,
    adapters: Sequence[str] = (),
    bits: int | None = None,
    device_map: str | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[tuple[str, str]]:
    """Answer one prompt, laid out as in training, by each adapter asked for; the run's data may be gone.

    Args:
        run: a run folder.
        prompt: the instruction.
        input: what the instruction is about, as in an Alpaca row.
        adapter, adapters, bits, device_map, overrides: as in :func:`~trainer.inference.run_model.load_run`.

    Yields:
        Names and answers, the run's own (or the base's in its place) first.
    """
    loaded = load_run(
        run, overrides, adapter=adapter, adapters=adapters, bits=bits, device_map=device_map, with_data=False
    )
    for note in loaded.notes:
        logger.info(f"note: {note}")
    config = loaded.config
    template = Template(loaded.tokenizer, config.data.template, config.data.alpaca_role, config.data.train_on)
    ids, end_ids = template.encode_prompt(prompt, input), template.end_ids()
    for name in loaded.asked:
        model = loaded.switch.use(name)
        torch.manual_seed(config.run.seed)
        generator = Generator(model, loaded.tokenizer, config.generate, end_ids, model.device)
        yield name, generator.decode(generator.answer([ids])[0]).strip()
