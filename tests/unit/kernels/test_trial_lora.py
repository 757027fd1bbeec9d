"""K trials on one base are K models of stock PEFT with one adapter each: losses, every gradient, generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config.method import MethodConfig
from trainer.config.schema import ModelConfig
from trainer.data.batching.micro_batch import MicroBatch, Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.kernels import trial_lora
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.selective_checkpoint import checkpoint_arguments, keep_linears
from trainer.kernels.trial_lora import ActiveTrials, patch_trial_linears
from trainer.kernels.trie_attention import KERNEL, register, trie_context
from trainer.methods import attach, trainable_parameters
from trainer.methods.attach import attach_trials
from trainer.methods.parameters import trial_parameters
from trainer.models.loading import load_model

KINDS = [
    MethodConfig(r=4),
    MethodConfig(r=8, target_modules="attention", alpha=5.0),
    MethodConfig(r=2, layers=[1], rslora=True, alpha=3.0),
    MethodConfig(r=4, target_modules=["up_proj", "down_proj"], alpha=40.0),
    MethodConfig(r=16, rslora=True, rank_pattern={"q_proj": 3}),
]
ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 11, 12, 13, 14, 15], [5, 6, 30, 31], [40, 41, 42]]


def base(folder: Path, bits: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    method = MethodConfig(bits=bits)
    model = load_model(str(folder), ModelConfig(), method, dtype, torch.device("cpu"), 0)
    register()
    model.set_attn_implementation(KERNEL)
    return model


def randomise(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Move A and B away from where they start, so that B's zeros hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@dataclass
class Trials:
    """Trials on one base."""

    model: Any
    names: tuple[str, ...]
    active: ActiveTrials
    loss: LabelLoss

    def through(self, batch: MicroBatch, scales: Tensor | None = None) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return each active trial's loss sum and its gradients by a lone run's names; none where it has none."""
        self.model.zero_grad()
        count = len(self.active.names)
        with trie_context(batch.paths, count, self.active.shares_layers):
            sums = self.loss(self.model, batch, count)
            (sums if scales is None else sums * scales).sum().backward()
        return sums.detach(), [gradients(trial_parameters(self.model, name)) for name in self.names]


def gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def together(model: Any, methods: Sequence[MethodConfig], chunk_elements: int | None = None) -> Trials:
    names = tuple(f"trial_{k}" for k in range(len(methods)))
    wrapped = attach_trials(model, {name: (m, k) for k, (name, m) in enumerate(zip(names, methods, strict=True))})
    for k, name in enumerate(names):
        randomise(trial_parameters(wrapped, name), k)
    active = ActiveTrials(names)
    assert patch_trial_linears(wrapped, active) is not None
    return Trials(wrapped.eval(), names, active, LabelLoss(wrapped, chunk_elements))


def lone(model: Any, method: MethodConfig, k: int) -> Any:
    """Stock PEFT with the adapter of trial k, without kernels."""
    wrapped = attach(model, method, k)
    randomise(trainable_parameters(wrapped), k)
    return wrapped.eval()


def lone_losses_and_gradients(models: list[Any], batch: MicroBatch) -> list[tuple[Tensor, dict[str, Tensor]]]:
    expected = []
    for model in models:
        model.zero_grad()
        with trie_context(batch.paths):
            value = LabelLoss(model)(model, batch)
            value.backward()
        expected.append((value.detach(), gradients(trainable_parameters(model))))
    return expected


def collate(uses_trie: bool, in_pieces: bool = False, rows: list[list[int]] = ROWS) -> MicroBatch:
    examples = [Tokens(np.asarray(row, np.int32), np.arange(len(row)) > 1) for row in rows]
    return Packing(uses_trie, Limits(None, 4096), 0, in_pieces=in_pieces).collate(examples, range(len(rows)))


LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the relative distance of a trial's whole gradient."""
    assert list(found) == list(expected)
    one, other = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (found, expected))
    return float((one - other).norm() / other.norm())


def assert_as_alone(
    found: tuple[Tensor, list[dict[str, Tensor]]], expected: list[tuple[Tensor, dict[str, Tensor]]], limit: float
) -> None:
    for value, own, (wanted, others) in zip(*found, expected, strict=True):
        assert abs(float(value - wanted)) <= limit * float(wanted)
        assert far(own, others) <= limit
        assert max(far({name: own[name]}, {name: others[name]}) for name in own) <= 3 * limit


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize(
    ("bits", "dtype", "limit"),
    [
        (16, torch.float64, 1e-7),  # the loss is fp32
        (16, torch.float32, 2e-6),  # stock PEFT itself is up to 1.2e-6 from fp64
        (4, torch.float32, 2e-6),
        (8, torch.float32, 2e-6),
    ],
)
def test_every_trial_is_stock_peft_alone(
    tiny_model: Path, bits: int, dtype: torch.dtype, limit: float, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout of a micro-batch, with the products of CPU and of CUDA."""
    monkeypatch.setattr(trial_lora, "pads_ranks", lambda _: pads)
    for count in (1, 2, 5):
        trials = together(base(tiny_model, bits, dtype), KINDS[:count])
        models = [lone(base(tiny_model, bits, dtype), method, k) for k, method in enumerate(KINDS[:count])]
        for layout in LAYOUTS:
            batch = collate(*layout)
            assert_as_alone(trials.through(batch), lone_losses_and_gradients(models, batch), limit)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_chunks_and_through_an_adapted_output_layer(tiny_model: Path, layout: tuple[bool, bool]) -> None:
    head = [MethodConfig(r=2, target_modules=["lm_head", "q_proj"]), MethodConfig(r=3, target_modules=["lm_head"])]
    batch = collate(*layout)
    for methods in (KINDS, [KINDS[0], *head]):
        trials = together(base(tiny_model, dtype=torch.float64), methods, chunk_elements=11 * 384)
        models = [lone(base(tiny_model, dtype=torch.float64), method, k) for k, method in enumerate(methods)]
        met: list[int] = []
        hook = trials.model.get_output_embeddings().register_forward_hook(
            lambda _, args, out, met=met: met.append(out.shape[:-1].numel())
        )
        expected = lone_losses_and_gradients(models, batch)
        assert_as_alone(trials.through(batch), expected, 1e-7)
        hook.remove()
        assert max(met) <= 11
        assert len(met) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_loss_has_its_own_gradient_and_inactive_trials_have_none(
    tiny_model: Path, layout: tuple[bool, bool]
) -> None:
    trials, batch = together(base(tiny_model), KINDS, chunk_elements=20 * 384), collate(*layout)
    sums, whole = trials.through(batch)
    trials.active.names = ("trial_4", "trial_1")
    scales = torch.tensor([0.5, 3.0])
    found, few = trials.through(batch, scales)
    torch.testing.assert_close(found, sums[[4, 1]])
    assert not any(few[k] for k in (0, 2, 3))
    for k, scale in ((4, 0.5), (1, 3.0)):
        assert far(few[k], {name: gradient * scale for name, gradient in whole[k].items()}) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pads", [False, True])
def test_a_trial_that_diverged_leaves_the_others_to_the_bit(
    tiny_model: Path, layout: tuple[bool, bool], pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_lora, "pads_ranks", lambda _: pads)
    trials, batch = together(base(tiny_model), KINDS), collate(*layout)
    sums, expected = trials.through(batch)
    with torch.no_grad():
        for parameter in trial_parameters(trials.model, "trial_1").values():
            parameter.fill_(float("nan"))
    found, others = trials.through(batch)
    assert found.isnan().tolist() == [False, True, False, False, False]
    for k in (0, 2, 3, 4):
        assert found[k] == sums[k]
        assert all(torch.equal(others[k][name], gradient) for name, gradient in expected[k].items())


@pytest.mark.parametrize("selective", [False, True])
def test_with_gradient_checkpointing(tiny_model: Path, selective: bool) -> None:
    trials, batch = together(base(tiny_model, dtype=torch.float64), KINDS), collate(True)
    sums, expected = trials.through(batch)
    if selective:
        assert keep_linears(trials.model)
    trials.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_arguments(selective))
    trials.model.enable_input_require_grads()
    trials.model.train()
    found, others = trials.through(batch)
    torch.testing.assert_close(found, sums)
    assert max(map(far, others, expected)) < 1e-7


def test_generation_gives_each_trial_its_own_tokens(tiny_model: Path) -> None:
    trials = together(base(tiny_model), KINDS)
    with torch.no_grad():
        for name in trials.names:
            for parameter in trial_parameters(trials.model, name).values():
                parameter.mul_(8)  # answers differ
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [9, 10, 11, 12, 13]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])

    def answers() -> Tensor:
        count = len(trials.active.names)
        inputs = {"input_ids": ids.repeat(count, 1), "attention_mask": mask.repeat(count, 1)}
        return trials.model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)

    found = answers().split(2)
    assert len({str(own.tolist()) for own in found}) == len(KINDS)
    for name, own in zip(trials.names, found, strict=True):
        trials.active.names = (name,)
        assert torch.equal(answers(), own)
