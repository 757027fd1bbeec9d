"""On two ranks: NEFTune's noise under every ZeRO stage, in tries and padded rows, against one plain process that runs
each row by itself; the noise is written out there, from the same random numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.distributed.bench import Bench, gather_weights
from tests.helpers.reference import reference_model, reference_optimizer, worst_distance
from trainer.data.batching.micro_batch import MicroBatch
from trainer.kernels.embedding_noise import OF_NOISE
from trainer.models.embedded import resolve
from trainer.training.dropout_seed import dropout_seed
from trainer.training.loop import Loop

ALPHA, STEPS = 5.0, 5
CASES: dict[str, list[str]] = {
    "lora trie stage0": ["zero=stage0"],
    "lora trie stage2 checkpointing": ["zero=stage2", "model.gradient_checkpointing=true"],
    "lora padded stage1": ["zero=stage1", "batch.packing=padded"],
    "lora padded stage3 kernels": ["zero=stage3", "batch.packing=padded", "model.kernels=[varlen,lora,rms_norm]"],
    "full padded stage3": ["zero=stage3", "method=full", "batch.packing=padded"],
    "prompt stage2": ["zero=stage2", "method=prompt", "method.virtual_tokens=4"],
}


def distance(bench: Bench, overrides: list[str]) -> float | None:
    """After five steps, to the plain process; evaluations in between have no noise and change none."""
    common = [f"model.neftune_alpha={ALPHA}", "batch.micro_size=3", "schedule=constant", "schedule.warmup_ratio=0"]
    common += ["optim.learning_rate=0.003"]
    loop = bench.loop(bench.config(*common, *overrides))
    for step in range(STEPS):
        loop.step(step)
        if step == 1:
            scores = [loop.evaluate().metrics["eval_loss"] for _ in range(2)]
            assert scores[0] == scores[1], "noise in an evaluation"
    found = gather_weights(loop)
    return worst_distance(found, noisy_reference(loop)) if bench.world.is_main else None


def noisy_reference(loop: Loop) -> dict[str, Tensor]:
    """The trained tensors of stock transformers and PEFT, row by row, with noise from a hook."""
    config = loop.config
    model = reference_model(resolve(config.model.name_or_path), config, STEPS)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = reference_optimizer(model, trained, config)
    noise: list[Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _, __, embedded: embedded + noise[0])
    model.train()
    for step in range(STEPS):
        made = [replace(loop.loader.source, rank=rank).make(step) for rank in range(2)]
        for rank, batches in enumerate(made):
            for k, batch in enumerate(batches.batches):
                seed = dropout_seed(config.run.seed, step, rank, k)
                for row, own in zip(
                    loop.data.train.examples(batch.rows), noise_of_rows(loop, batch, seed), strict=True
                ):
                    noise[:] = [own]
                    (row_loss(model, row) / made[0].label_tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in trained.items()}


def row_loss(model: Any, row: dict[str, Any]) -> Tensor:
    ids = torch.tensor([row["input_ids"]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
    begin = row["prompt_length"]
    return torch.nn.functional.cross_entropy(logits[begin - 1 : -1], ids[0, begin:], reduction="sum")


def noise_of_rows(loop: Loop, batch: MicroBatch, seed: int) -> list[Tensor]:
    """Of each row, (1, tokens, width): the paper's in padded rows; of a shared token the mean energy of its rows."""
    rows = [row["input_ids"] for row in loop.data.train.examples(batch.rows)]
    width = loop.engine.model.config.hidden_size
    generator = torch.Generator().manual_seed(seed ^ OF_NOISE)
    drawn = torch.empty(*batch.input_ids.shape, width).uniform_(-1, 1, generator=generator)
    if batch.position_ids is None:
        own = [drawn[k, : len(row)] * (ALPHA / math.sqrt(len(row) * width)) for k, row in enumerate(rows)]
        return [each[None] for each in own]
    node_of = _nodes(batch)
    sharing: dict[int, list[int]] = {}
    for row in rows:
        for end in range(1, len(row) + 1):
            sharing.setdefault(node_of[tuple(row[:end])], []).append(len(row))
    out = []
    for row in rows:
        nodes = [node_of[tuple(row[:end])] for end in range(1, len(row) + 1)]
        energies = [sum(ALPHA**2 / (n * width) for n in sharing[node]) / len(sharing[node]) for node in nodes]
        out.append((drawn[0, nodes] * torch.tensor(energies).sqrt()[:, None])[None])
    return out


def _nodes(batch: MicroBatch) -> dict[tuple[int, ...], int]:
    """Where each prefix ends in a trie, which is laid out depth first."""
    assert batch.position_ids is not None, "of a trie"
    found: dict[tuple[int, ...], int] = {}
    path: list[int] = []
    for node, (token, depth) in enumerate(
        zip(batch.input_ids[0].tolist(), batch.position_ids[0].tolist(), strict=True)
    ):
        path = [*path[:depth], token]
        found[tuple(path)] = node
    return found


if __name__ == "__main__":
    Bench().record({name: partial(distance, overrides=overrides) for name, overrides in CASES.items()})
