"""Answer one prompt with a finished run's model, in one process, without DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trainer.data.templates.template import Template
from trainer.evaluation.generator import Generator
from trainer.inference.run_model import load_run

logger = logging.getLogger(__name__)


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
    """Answer one prompt, in the template of training, by each adapter asked for; the run's data may be gone.

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
    template = Template.from_config(loaded.tokenizer, config.data)
    ids, end_ids, opening_ids = template.encode_prompt(prompt, input), template.end_ids(), template.opening_ids()
    for name in loaded.requested:
        model = loaded.switcher.use(name)
        torch.manual_seed(config.run.seed)
        generator = Generator(model, loaded.tokenizer, config.generate, end_ids, model.device, opening_ids=opening_ids)
        yield name, generator.decode(generator.answer([ids])[0]).strip()
