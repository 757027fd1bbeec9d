"""Score a finished run again on its held-out rows, in one process, without DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.load import load_data
from trainer.data.run_data import Data
from trainer.distributed import process_group as distributed
from trainer.errors import DataError
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.generator import Generator
from trainer.inference.run_model import RunModel, load_run
from trainer.kernels.label_loss import LabelLoss

logger = logging.getLogger(__name__)


class PlainScorer:
    """Compute loss and logits of a model without DeepSpeed."""

    def __init__(self, model: Any) -> None:
        self.model, self.loss = model, LabelLoss(model)

    def loss_sum(self, batch: MicroBatch) -> Tensor:
        """Return the summed cross-entropy of one micro-batch."""
        return self.loss(self.model, batch)

    def label_logits(self, batch: MicroBatch) -> Tensor:
        """Return the logits at its label positions, (labels, vocabulary)."""
        return self.loss.logits(self.model, batch)


def score_run(run: Path, overrides: Sequence[str] = (), adapters: Sequence[str] = ()) -> dict[str, dict[str, float]]:
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
        return {name: _score_adapter(loaded, name, data) for name in loaded.requested}
    finally:
        distributed.shutdown()


def _score_adapter(loaded: RunModel, name: str, data: Data) -> dict[str, float]:
    """Return the metrics of one adapter; sampled answers do not depend on what was scored before."""
    config, model = loaded.config, loaded.switcher.use(name)
    torch.manual_seed(config.run.seed)
    generator = Generator(
        model, loaded.tokenizer, config.generate, data.end_ids, loaded.world.device, opening_ids=data.opening_ids
    )
    packing = Packing(False, Limits(config.batch.micro_size, config.batch.micro_tokens), generator.pad_id)
    return evaluate(PlainScorer(model), generator, packing, data, config, loaded.world).metrics
