"""Layers below the lowest adapted one run on the rows of one trial, and every trial is stock PEFT alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.architecture_table import TABLE
from tests.helpers.architectures import random_model
from tests.unit.kernels.test_trial_lora import (
    Trials,
    assert_as_alone,
    collate,
    far,
    lone,
    lone_losses_and_gradients,
    together,
)
from trainer.config.method import MethodConfig
from trainer.kernels.patch import Patch
from trainer.kernels.selective_checkpoint import checkpoint_arguments
from trainer.kernels.shared_layers import share_lower_layers
from trainer.kernels.trie_attention import KERNEL, register
from trainer.models.first_layers import find_decoder_layers

LAYERS = 4
# A layer reads keys that an earlier one kept, or a bias with a row a head: the start-up verification finds it.
UNLIKE = {"bloom", "gemma4"}
ROWS = [[5, 6, 7, 8, 9], [5, 6, 7, 11, 12, 13, 14, 15], [5, 6, 30, 31], [4, 21, 22]]
LAYOUTS = [(False, False), (True, False), (True, True)]


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = random_model(TABLE["llama"], num_hidden_layers=LAYERS, vocab_size=50).to(dtype).eval()
    register()
    model.set_attn_implementation(KERNEL)
    return model


def decoder_layers(model: Any) -> Any:
    stack = find_decoder_layers(model)
    assert stack is not None
    return stack[2]


def share(trials: Trials) -> Patch | None:
    stack = find_decoder_layers(trials.model)
    assert stack is not None
    return share_lower_layers(trials.model, *stack[:2], trials.active)


@contextmanager
def rows_seen(model: Any) -> Iterator[list[int]]:
    """Collect how many rows come out of each layer, as often as it is run."""
    seen: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, out: seen.append(len(out[0] if isinstance(out, tuple) else out)))
        for layer in decoder_layers(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@settings(max_examples=25, deadline=None)
@given(
    adapted=st.lists(st.sets(st.integers(0, LAYERS - 1), min_size=1), min_size=2, max_size=4),
    layout=st.sampled_from(LAYOUTS),
)
def test_every_trial_is_stock_peft_alone(adapted: list[set[int]], layout: tuple[bool, bool]) -> None:
    methods = [MethodConfig(r=2 + k, layers=sorted(own), target_modules="attention") for k, own in enumerate(adapted)]
    trials, batch = together(llama(), methods), collate(*layout)
    assert (share(trials) is None) == all(0 in own for own in adapted)
    rows, lowest = len(batch.input_ids), min(map(min, adapted))
    with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
        found = trials.through(batch)
    assert seen == [rows] * lowest + [len(adapted) * rows] * (LAYERS - lowest)
    models = [lone(llama(), method, k) for k, method in enumerate(methods)]
    assert_as_alone(found, lone_losses_and_gradients(models, batch), 5e-7)  # the loss is fp32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_many_layers_as_the_active_trials_share(layout: tuple[bool, bool]) -> None:
    methods = [MethodConfig(r=4, layers=[place]) for place in range(LAYERS)]
    trials, batch = together(llama(), methods), collate(*layout)
    share(trials)
    rows = len(batch.input_ids)
    for names, shared in ((("trial_3", "trial_2"), 2), (("trial_3",), 0), (("trial_0", "trial_3"), 0)):
        trials.active.names = names
        with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
            trials.through(batch)
        assert seen == [rows] * shared + [len(names) * rows] * (LAYERS - shared)


@pytest.mark.parametrize("selective", [False, True])
def test_with_gradient_checkpointing(selective: bool) -> None:
    methods = [MethodConfig(r=4, layers=[2, 3]), MethodConfig(r=2, layers=[3], target_modules=["lm_head", "q_proj"])]
    trials, batch = together(llama(), methods), collate(True)
    sums, expected = trials.through(batch)
    share(trials)
    trials.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpoint_arguments(selective))
    trials.model.train()
    with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
        found, gradients = trials.through(batch)
    assert seen == [1, 1, 2, 2]
    torch.testing.assert_close(found, sums)
    assert max(map(far, gradients, expected)) < 1e-7


def test_a_trial_of_the_output_layer_alone_is_told_apart_in_the_last_layer() -> None:
    methods = [MethodConfig(r=k, target_modules=["lm_head"]) for k in (2, 3)]
    trials, batch = together(llama(), methods), collate(True)
    share(trials)
    with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
        found = trials.through(batch)
    assert seen == [1, 1, 1, 2]
    models = [lone(llama(), method, k) for k, method in enumerate(methods)]
    assert_as_alone(found, lone_losses_and_gradients(models, batch), 5e-7)  # the loss is fp32


def test_of_other_tokens_no_layer_is_shared() -> None:
    """As in generation, where each trial reads what it has written."""
    trials = together(llama(), [MethodConfig(r=4, layers=[3])] * 2)
    share(trials)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with rows_seen(trials.model) as seen, torch.no_grad():
        both = trials.model(input_ids=ids).logits
        for k, name in enumerate(trials.names):
            trials.active.names = (name,)
            torch.testing.assert_close(both[k : k + 1], trials.model(input_ids=ids[k : k + 1]).logits)
    assert seen == [2] * LAYERS + [1] * 2 * LAYERS


def test_undone_every_layer_has_the_rows_of_all() -> None:
    trials, batch = together(llama(), [MethodConfig(r=4, layers=[3])] * 2), collate(True)
    patch = share(trials)
    assert patch is not None
    patch.undo()
    with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
        trials.through(batch)
    assert seen == [2] * LAYERS


@pytest.mark.parametrize("name", TABLE)
def test_an_architecture_shares_or_is_found_out(name: str) -> None:
    row = TABLE[name]
    torch.manual_seed(0)
    model = random_model(row).eval()
    last = len(decoder_layers(model)) - 1
    trials = together(model, [MethodConfig(r=4, layers=[last])] * 3)
    for uses_trie in [False] if row.padded else [False, True]:
        if uses_trie:
            register()
            trials.model.set_attn_implementation(KERNEL)
        batch = collate(uses_trie, rows=ROWS)
        sums, expected = trials.through(batch)
        patch = share(trials)
        assert patch is not None
        try:
            with rows_seen(trials.model) as seen, trials.active.on_same_tokens():
                found, gradients = trials.through(batch)
        except (IndexError, RuntimeError):
            assert name in UNLIKE
            continue
        finally:
            patch.undo()
        assert name not in UNLIKE
        rows = len(batch.input_ids)
        assert seen == [rows] * last + [3 * rows]
        torch.testing.assert_close(found, sums, rtol=1e-6, atol=0)
        assert max(map(far, gradients, expected)) < 1e-5
