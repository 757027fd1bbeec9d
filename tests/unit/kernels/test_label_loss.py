"""The loss on the tokens in the loss alone, against stock transformers on full logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.architectures import tiny
from trainer.data.batching.micro_batch import MicroBatch, Tokens, collate_padded
from trainer.kernels.label_loss import LabelLoss

Rows = list[dict[str, Any]]


def random_rows(lengths: list[int], vocabulary: int = 384, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def row(length: int) -> dict[str, Any]:
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        return {"input_ids": ids, "labels": torch.rand(length, generator=generator).gt(0.4).tolist()}

    return [row(length) for length in lengths]


def stock_loss_sum(model: nn.Module, rows: Rows) -> Tensor:
    """Row by row, full logits, labels of -100, transformers' own shifted mean made a sum again."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        loss_mask = torch.where(torch.tensor([row["labels"]]), ids, -100)
        count = int((loss_mask[:, 1:] != -100).sum())
        if count:
            total = total + model(input_ids=ids, labels=loss_mask).loss * count
    return total


def padded(rows: Rows, which: Any, pad_id: int) -> MicroBatch:
    examples = [Tokens(np.asarray(r["input_ids"], np.int32), np.asarray(r["labels"], bool)) for r in rows]
    return collate_padded(examples, which, pad_id)


OUTPUTS = ("tiny", "gpt2", "gpt_neox", "qwen2", "mistral, window 8", "gemma2", "cohere")
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64},
    "qwen2": {"tie_word_embeddings": True},
    "mistral, window 8": {"sliding_window": 4},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4},
}


def small_model(name: str) -> Any:
    torch.manual_seed(0)
    changes = {"vocab_size": 384, "initializer_range": 0.02, "pad_token_id": None, **CHANGES.get(name, {})}
    return tiny(name, **changes).eval()


def stock_loss_and_gradients(model: Any, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    expected = stock_loss_sum(model, rows)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return expected, gradients


def assert_gradients(model: Any, expected: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        far = float((parameters[name].grad - gradient).norm())
        assert far <= 2e-5 * float(gradient.norm()) + 1e-6, name


@pytest.mark.parametrize("name", OUTPUTS)
def test_loss_and_gradient_equal_transformers(model: Any, name: str) -> None:
    """Also where something follows the output layer: Gemma 2 caps its logits, Cohere scales them."""
    model = model if name == "tiny" else small_model(name)
    rows = random_rows([5, 12, 1, 9])
    rows[1]["labels"][0] = True
    expected, gradients = stock_loss_and_gradients(model, rows)

    found = LabelLoss(model)(model, padded(rows, range(4), pad_id=0))
    assert found.dtype == torch.float32
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    assert_gradients(model, gradients)


def test_any_pad_id_and_any_cut_give_the_same_sum(model: Any) -> None:
    rows, loss = random_rows([5, 12, 7]), LabelLoss(model)
    whole = [loss(model, padded(rows, range(3), pad_id=pad)).item() for pad in (0, 2, 383)]
    parts = sum(loss(model, padded([row], [0], pad_id=0)).item() for row in rows)
    assert whole == pytest.approx([whole[0]] * 3, rel=1e-6)
    assert parts == pytest.approx(whole[0], rel=1e-5)


def test_weights_multiply_their_labels(model: Any) -> None:
    import dataclasses

    loss, batch = LabelLoss(model), padded(random_rows([12]), [0], pad_id=0)
    each = []
    for k in range(len(batch.weight)):
        one = torch.zeros_like(batch.weight)
        one[k] = 1
        each.append(loss(model, dataclasses.replace(batch, weight=one)).item())
    weight = torch.arange(len(each), dtype=torch.float32)
    found = loss(model, dataclasses.replace(batch, weight=weight)).item()
    assert found == pytest.approx(sum(w * e for w, e in zip(weight.tolist(), each, strict=True)), rel=1e-5)


@pytest.mark.parametrize("without", ["rows", "labels"])
def test_without_labels_the_loss_is_zero_and_connected(model: Any, without: str) -> None:
    rows = [] if without == "rows" else [{"input_ids": [5, 6, 7], "labels": [True, False, False]}]
    loss = LabelLoss(model)(model, padded(rows, range(len(rows)), pad_id=0))
    assert loss.item() == 0.0
    assert loss.grad_fn is not None
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_only_label_positions_meet_the_vocabulary(model: Any) -> None:
    met: list[torch.Size] = []
    loss = LabelLoss(model)
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: met.append(args[0].shape[:-1]))
    batch = padded(random_rows([5, 12, 7]), range(3), pad_id=0)
    loss(model, batch)
    loss(model, padded([], [], pad_id=0))
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids)  # a forward of anybody else's is left alone
    assert met == [(1, len(batch.source)), (1, 1), (1, 3)]


def test_a_forward_that_fails_leaves_the_model_usable(model: Any) -> None:
    loss = LabelLoss(model)

    def fails(**_: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        loss(fails, padded(random_rows([5]), [0], pad_id=0))
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


def test_through_peft_the_loss_is_the_same(model: Any) -> None:
    from trainer.config.schema import MethodConfig
    from trainer.methods import attach

    batch = padded(random_rows([5, 12]), range(2), pad_id=0)
    expected = float(stock_loss_sum(model, random_rows([5, 12])))
    wrapped = attach(model, MethodConfig(r=4), seed=0)
    assert float(LabelLoss(wrapped)(wrapped, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [*OUTPUTS, "granite"])
def test_in_chunks_the_loss_and_gradient_are_the_same(model: Any, name: str) -> None:
    model = model if name == "tiny" else small_model(name)
    rows = random_rows([5, 12, 1, 9])
    expected, gradients = stock_loss_and_gradients(model, rows)
    batch = padded(rows, range(4), pad_id=0)
    met: list[int] = []
    loss = LabelLoss(model, chunk_elements=4 * 384)
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: met.append(args[0].shape[-2]))
    found = loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found.backward()
    assert max(met) <= 4
    assert sum(met) == 2 * len(batch.source) - met[0] + 1, "one look at what follows the layer, the rest twice"
    assert_gradients(model, gradients)


def test_in_chunks_under_a_frozen_output_layer(model: Any) -> None:
    from trainer.config.schema import MethodConfig
    from trainer.methods import attach

    wrapped = attach(model, MethodConfig(r=4), seed=0)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    batch = padded(random_rows([5, 12, 9]), range(3), pad_id=0)
    met: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: met.append(args[0].shape[-2]))
    found = []
    for elements in (10**9, 4 * 384):
        value = LabelLoss(wrapped, chunk_elements=elements)(wrapped, batch) * 0.5
        found.append((value.detach(), torch.autograd.grad(value, trained)))
    assert met[0] == len(batch.source)
    assert max(met[1:]) <= 4
    assert sum(met[1:]) == len(batch.source) + 1, "each label once, and one look at what follows the layer"
    torch.testing.assert_close(found[1][0], found[0][0])
    for whole, chunked in zip(found[0][1], found[1][1], strict=True):
        # relative to the whole tensor: single entries near zero differ by more, machine by machine
        assert (chunked - whole).norm() <= 1e-5 * whole.norm()


def test_a_rank_with_fewer_labels_calls_the_output_layer_as_often(model: Any) -> None:
    import dataclasses

    rows = random_rows([5, 3])
    loss = LabelLoss(model, chunk_elements=384)
    met: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: met.append(args[0].shape[-2]))
    for batch in (padded(rows, range(2), pad_id=0), padded([], [], pad_id=0)):
        met.clear()
        found = loss(model, dataclasses.replace(batch, max_labels=12))
        found.backward()
        assert len(met) in (12 + 11, 12 + 11 + 1)
        torch.testing.assert_close(found, stock_loss_sum(model, rows if batch.rows else []), rtol=1e-5, atol=1e-6)


def test_a_model_with_logits_of_its_own_making_is_not_cut(model: Any) -> None:
    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 3 + 1
            return output

    model.__class__ = Odd
    rows = random_rows([5, 12])
    batch = padded(rows, range(2), pad_id=0)
    expected = LabelLoss(model)(model, batch).item()
    with pytest.warns(UserWarning, match="logits in a way of its own"):
        found = LabelLoss(model, chunk_elements=4 * 384)(model, batch).item()
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("elements", [None, 4 * 384])
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("name", ["tiny", "gemma2", "cohere"])
def test_the_loss_of_each_trial_is_that_of_its_rows(
    model: Any, name: str, is_trained: bool, elements: int | None
) -> None:
    """Each trial changes the token embeddings in its own way."""
    model = model if name == "tiny" else small_model(name)
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=is_trained)
    batch = padded(random_rows([5, 12, 1, 9]), range(4), pad_id=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    offsets, scales = torch.tensor([0.0, 0.9, -0.7]), torch.tensor([1.0, 0.5, 2.0])
    ramp = torch.linspace(-1, 1, words.weight.shape[1])

    def loss_and_gradients(own: Tensor, trials: int | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        change = 1 + own.repeat_interleave(len(batch.input_ids))[:, None, None] * ramp
        hook = words.register_forward_hook(lambda _, __, out: out * change)
        loss = LabelLoss(model, elements)
        value = loss(model, batch, trials)
        found = torch.autograd.grad((value * (1 if trials is None else scales)).sum(), trained)
        hook.remove()
        return value.detach(), found

    found, gradients = loss_and_gradients(offsets, 3)
    each = [loss_and_gradients(offsets[k : k + 1], None) for k in range(3)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([value for value, _ in each]), rtol=1e-5, atol=0)
    assert len(set(found.tolist())) == 3
    for k, gradient in enumerate(gradients):
        expected = sum(scale * own[k] for scale, (_, own) in zip(scales, each, strict=True))
        assert float((gradient - expected).norm()) <= 2e-5 * float(expected.norm()) + 1e-6


def test_without_labels_each_trial_has_a_loss_of_zero(model: Any) -> None:
    import dataclasses

    batch = dataclasses.replace(padded([], [], pad_id=0), max_labels=3)
    found = LabelLoss(model, chunk_elements=384)(model, batch, 2)
    assert found.tolist() == [0, 0]
    found.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
