"""Merge a finished run's adapter into its base, and verify the result on the run's own rows."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config.method import MethodConfig
from trainer.data.load import load_data
from trainer.data.run_data import Data
from trainer.distributed import process_group as distributed
from trainer.inference.run_model import load_run, load_run_config
from trainer.kernels.rms_norm import patch_rms_norms
from trainer.merge.card import model_card
from trainer.merge.merge import MergeResult, check_mergeable, logits_at_positions, merge
from trainer.models.end_tokens import restore_base_eos
from trainer.models.loading import load_model, load_tokenizer
from trainer.tracking.files import find_summary

MAX_PROMPTS, MAX_PROMPT_TOKENS = 16, 256  # rows of the run's data that a merge is verified on, and how much of each


def merge_run(run: Path, to: Path, overrides: Sequence[str] = ()) -> MergeResult:
    """Merge a run's adapter into its base, in 16 bits (or as ``model.dtype`` says), and verify it.

    Args:
        run: a finished run's folder.
        to: the plain Hugging Face folder that is made.
        overrides: laid over the run's own config.yaml.

    Raises:
        CheckpointError: the method cannot be merged, the run has no adapter, or the merged model answers otherwise.
    """
    config = load_run_config(run, overrides)
    check_mergeable(config)
    with_tokens = dataclasses.replace(config.model, revision=None, new_tokens=None)  # what is saved has the new ones
    tokenizer = restore_base_eos(load_tokenizer(str(run / "adapter"), with_tokens), run / "adapter")
    data = load_data(config, tokenizer)
    prompts = _find_prompts(data)
    reference_logits = None
    if config.method.bits < 16:
        quantised = load_run(run, overrides)
        reference_logits = logits_at_positions(quantised.model, prompts)
        del quantised
        gc.collect()
    summary = find_summary(run)
    device = distributed.from_environment().device

    def reload(folder: Path, dtype: torch.dtype) -> Any:
        loaded = load_model(str(folder), with_tokens, MethodConfig(name="full"), dtype, device, zero_stage=0)
        patch_rms_norms(loaded)  # as in the live model: what is compared is the weights
        return loaded.eval().to(device)

    return merge(
        lambda: load_run(run, overrides, bits=16).model,
        tokenizer,
        prompts,
        to,
        reload,
        lambda result: model_card(config, summary, result),
        reference_logits,
        data.end_ids,
        config.model.revision,
    )


def _find_prompts(data: Data) -> list[list[int]]:
    """Return token ids of rows of the run's own data, held-out ones first."""
    rows = data.validation if len(data.validation) else data.train
    return [tokens.ids[:MAX_PROMPT_TOKENS].tolist() for tokens in rows.tokens(range(min(MAX_PROMPTS, len(rows))))]
