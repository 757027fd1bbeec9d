"""The start-up proof: it accepts right models on any rows, and no mistake gets past it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import trainer.data.batching.micro_batch as micro
import trainer.models.first_layers as layers
from tests.helpers.architecture_table import RECURRENT
from tests.helpers.architectures import ARCHITECTURES, KINDS_OF_ATTENTION, VOCABULARY, random_model, tiny
from trainer.config import TrainConfig, load
from trainer.config.schema import MethodConfig
from trainer.data.batching.micro_batch import Tokens
from trainer.data.batching.packing import Packing
from trainer.data.batching.trie import Trie
from trainer.data.batching.trie_paths import Bucket, TriePaths
from trainer.data.run_data import Data
from trainer.engine.kernel_set import KernelSet
from trainer.engine.verification import BOUNDS, Verification
from trainer.engine.verification_rows import smallest_window, verification_rows
from trainer.engine.verify_kernels import Verifier, choose_packing_and_kernels, verify
from trainer.errors import ConfigError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trie_attention import KERNEL, register
from trainer.methods import attach
from trainer.models.loading import use_trie_kernel

WINDOWED = "mistral, window 8"


@dataclass
class Held:
    """Rows in memory, as ``trainer.data.load.Rows`` gives them."""

    rows: list[Tokens]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray([len(r.ids) for r in self.rows], dtype=np.int32)

    def tokens(self, which: Any) -> list[Tokens]:
        return [self.rows[int(i)] for i in which]


def rows_like(lengths: list[int], shared: int, seed: int = 0) -> Data:
    """Rows with a common beginning and a short answer at the end."""
    rng = np.random.default_rng(seed)
    head = rng.integers(2, VOCABULARY, shared)
    rows = []
    for length in lengths:
        ids = np.append(head, rng.integers(2, VOCABULARY, max(0, length - shared)))[:length].astype(np.int32)
        rows.append(Tokens(ids, np.arange(length) >= length - 3))
    return Data(Held(rows), Held([]), "", (), (), ())  # type: ignore[arg-type]


DATA = rows_like([17, 20, 22, 22, 25, 30, 31, 34], 14)


def config(packing: str = "auto", size: int = 8) -> TrainConfig:
    return load(["debug=tiny", f"batch.packing={packing}", f"batch.global_size={size}"])


def made(name: str, dtype: torch.dtype, seed: int = 0, adapter: bool = False, **changes: Any) -> tuple[Any, LabelLoss]:
    torch.manual_seed(seed)
    model = tiny(name, **changes).to(dtype)
    register()
    model.set_attn_implementation(KERNEL)
    if adapter:
        model = attach(model, MethodConfig(r=4), seed=0)
    return model, LabelLoss(model)


def choose_packing(model: Any, loss: LabelLoss, config: TrainConfig, data: Data, pad_id: int) -> tuple[Packing, str]:
    choice = choose_packing_and_kernels(model, loss, config, data, pad_id)
    return choice.packing, choice.lines[0]


def verified(model: Any, loss: LabelLoss, rows: list[Tokens]) -> Verification:
    return verify(Verifier(model, loss, [rows], 0, KernelSet(model), "rows"), rows, uses_trie=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS_OF_ATTENTION)
def test_right_models_are_accepted(name: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        model, loss = made(name, dtype, seed, adapter=seed % 2 == 1 and name != "gpt2")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        packing, why = choose_packing(model, loss, config("trie"), rows_like([17, 20, 22, 25, 30, 31, 34], 14, seed), 0)
        assert packing.uses_trie
        assert "verified on" in why
        after = dict(model.named_parameters())
        assert all(torch.equal(after[n], b) and after[n].dtype == b.dtype for n, b in before.items())
        assert all(p.grad is None for p in after.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_verified_or_padding_is_explained(name: str) -> None:
    torch.manual_seed(0)
    model = tiny(name)
    use_trie_kernel(model)
    packing, why = choose_packing(model, LabelLoss(model), config("auto"), DATA, 0)
    if name == "gemma2":  # its scores are capped, which SDPA cannot do
        assert not packing.uses_trie
        assert "attention is eager, which knows padded rows only" in why
    else:
        assert packing.uses_trie, why


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "lfm2"])
def test_a_state_is_padded_and_a_trie_refused(name: str) -> None:
    torch.manual_seed(0)
    model = random_model(RECURRENT[name])
    use_trie_kernel(model)
    packing, why = choose_packing(model, LabelLoss(model), config("auto"), DATA, 0)
    assert not packing.uses_trie
    assert "carry a state from token to token" in why
    with pytest.raises(ConfigError, match=r"trie: cannot be used: .* carry a state"):
        choose_packing(model, LabelLoss(model), config("trie"), DATA, 0)


def wrong_window(by: int) -> Callable[[pytest.MonkeyPatch], None]:
    def put_in(patch: pytest.MonkeyPatch) -> None:
        right = Bucket.mask
        patch.setattr(Bucket, "mask", lambda self, window: right(self, None if window is None else window + by))

    return put_in


def no_window(patch: pytest.MonkeyPatch) -> None:
    right = Bucket.mask
    patch.setattr(Bucket, "mask", lambda self, window: right(self, None))


def _change_trie(patch: pytest.MonkeyPatch, change: Callable[[Trie], None]) -> None:
    right = micro.build_trie

    def wrong(*args: Any, **more: Any) -> Trie:
        trie = right(*args, **more)
        change(trie)
        return trie

    patch.setattr(micro, "build_trie", wrong)


def _change_paths(patch: pytest.MonkeyPatch, change: Callable[[TriePaths], None]) -> None:
    right = micro.build_paths

    def wrong(trie: Trie) -> TriePaths:
        paths = right(trie)
        change(paths)
        return paths

    patch.setattr(micro, "build_paths", wrong)


def sees_a_sibling(patch: pytest.MonkeyPatch) -> None:
    """As if a subtree ended too late: one stretch of one example reads a single key of another example."""

    def change(paths: TriePaths) -> None:
        rows = [(b, row) for b in paths.buckets for row in range(len(b.keys)) if b.depths[row] > 0]
        for bucket, row in rows:
            last = int(bucket.depths[row])
            for other in paths.buckets:
                for node in other.keys[:, last].tolist() if last < other.keys.shape[1] else []:
                    if node not in (0, int(bucket.keys[row, last])):
                        bucket.keys[row, last] = node
                        return
        raise AssertionError("these rows have no siblings")

    _change_paths(patch, change)


def sees_one_too_many(patch: pytest.MonkeyPatch) -> None:
    def change(paths: TriePaths) -> None:
        for bucket in paths.buckets:
            bucket.depths += 1

    _change_paths(patch, change)


def deeper(patch: pytest.MonkeyPatch) -> None:
    def change(trie: Trie) -> None:
        trie.depths[len(trie.depths) // 2 :] += 1

    _change_trie(patch, change)


def one_label_too_many(patch: pytest.MonkeyPatch) -> None:
    def change(trie: Trie) -> None:
        trie.weights[np.flatnonzero(trie.weights)[-1]] += 1

    _change_trie(patch, change)


def labels_count_once(patch: pytest.MonkeyPatch) -> None:
    def change(trie: Trie) -> None:
        trie.weights[:] = trie.weights.clip(max=1)

    _change_trie(patch, change)


def parent_is_the_token_before(patch: pytest.MonkeyPatch) -> None:
    """Right but at the forks: the first token of a branch is predicted from the end of the branch before."""

    def change(trie: Trie) -> None:
        trie.parents[1:] = np.arange(len(trie.parents) - 1)

    _change_trie(patch, change)


MISTAKES = [
    sees_a_sibling,
    sees_one_too_many,
    deeper,
    one_label_too_many,
    labels_count_once,
    parent_is_the_token_before,
]
WINDOW_MISTAKES = {"one wider": wrong_window(1), "one narrower": wrong_window(-1), "none": no_window}
CASES = [
    *((name, mistake, torch.float32) for name in KINDS_OF_ATTENTION for mistake in MISTAKES),
    *(("llama", mistake, torch.bfloat16) for mistake in MISTAKES),
    *((WINDOWED, mistake, dtype) for mistake in WINDOW_MISTAKES.values() for dtype in (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize(("name", "mistake", "dtype"), CASES)
def test_no_mistake_gets_past(name: str, mistake: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty times beyond the bound of fp32, so real models leave room; also when the model itself is of 16 bits."""
    mistake(monkeypatch)
    model, loss = made(name, dtype)
    if dtype == torch.float32:
        for rows in verification_rows(config(), DATA, smallest_window(model))[:1]:
            proof = verified(model, loss, rows)
            assert max(proof.loss_distance, proof.gradient_distance) > 30 * BOUNDS[torch.float32]
    packing, why = choose_packing(model, loss, config("auto"), DATA, 0)
    assert not packing.uses_trie
    assert "differs from padded" in why
    with pytest.raises(ConfigError, match="differs from padded"):
        choose_packing(model, loss, config("trie"), DATA, 0)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mistake_gets_past_an_adapter(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh LoRA: A has no gradient yet, B has."""
    mistake(monkeypatch)
    model, loss = made("llama", torch.bfloat16, adapter=True)
    assert not choose_packing(model, loss, config(), DATA, 0)[0].uses_trie


@pytest.mark.parametrize("by", [-1, 1])
def test_a_wide_window_is_tried_if_any_training_row_is_longer(by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's rows are inside the window of 40; one row of the others is not."""
    model, loss = made(WINDOWED, torch.float32, sliding_window=40)
    assert smallest_window(model) == 40
    short, long = rows_like([20] * 40, 10), rows_like([20] * 39 + [70], 10)
    assert choose_packing(model, loss, config("trie"), long, 0)[0].uses_trie
    wrong_window(by)(monkeypatch)
    model, loss = made(WINDOWED, torch.float32, sliding_window=40)
    assert not choose_packing(model, loss, config(), long, 0)[0].uses_trie
    # no row leaves the window: it makes no difference how wide it is
    narrow_enough = choose_packing(model, loss, config(), short, 0)[0].uses_trie
    assert narrow_enough


@pytest.mark.parametrize(("name", "window"), [("llama", None), (WINDOWED, 8), ("qwen2", None), ("gpt2", None)])
def test_smallest_window(name: str, window: int | None) -> None:
    assert smallest_window(made(name, torch.float32)[0]) == window


def test_rows_of_the_proof_hold_the_hard_cases() -> None:
    (rows,) = verification_rows(config(), DATA, None)
    words = [tuple(r.ids.tolist()) for r in rows]
    assert len(set(words[:-2])) == len(words) - 2
    assert words[-2] in words[:-2]
    assert any(w[: len(words[-1])] == words[-1] and len(w) > len(words[-1]) for w in words)
    trie = micro.build_trie([r.ids for r in rows], [r.loss_mask for r in rows])
    assert trie.weights.max() >= 2
    forks = np.flatnonzero(trie.parents[1:] != np.arange(len(trie.ids) - 1)) + 1
    assert trie.weights[forks].any()


def test_a_single_row_of_one_token_is_no_trouble() -> None:
    data = Data(Held([Tokens(np.asarray([5], np.int32), np.asarray([True]))]), Held([]), "", (), (), ())  # type: ignore[arg-type]
    model, loss = made("llama", torch.float32)
    assert choose_packing(model, loss, config("trie", size=1), data, 0)[0].uses_trie


DEEP = {
    "llama": {"num_hidden_layers": 6},
    WINDOWED: {"num_hidden_layers": 6},
    "gpt2": {"n_layer": 6},
    "gemma3": {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 3]},
}
KEPT = {"gemma3": 4}  # until the first layer without a window; of the others, as many as are kept at least


def deep(name: str, adapter: bool = False, layers: list[int] | None = None) -> tuple[Any, LabelLoss]:
    """A model of six layers; in those that the proof should leave out, a weight that would spoil every number."""
    torch.manual_seed(0)
    model = tiny(name, **DEEP[name])
    register()
    model.set_attn_implementation(KERNEL)
    with torch.no_grad():
        for layer in stack(model)[KEPT.get(name, 2) :]:
            next(p for p in layer.parameters() if p.dim() == 2).fill_(float("nan"))
    if adapter:
        model = attach(model, MethodConfig(r=4, layers=layers), seed=0)
    return model, LabelLoss(model)


def stack(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_WHOLE_PARAMETERS", 0)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("name", DEEP)
def test_a_large_model_is_tried_on_its_first_layers_and_left_as_it_was(name: str) -> None:
    model, loss = deep(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    before, held = list(model.named_modules()), {n: p.detach().clone() for n, p in model.named_parameters()}
    packing, why = choose_packing(model, loss, config("trie"), DATA, 0)
    assert packing.uses_trie
    assert f"rows and the first {KEPT.get(name, 2)} of 6 layers against padded" in why
    assert list(model.named_modules()) == before
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n].nan_to_num(7), b.nan_to_num(7)) and after[n].requires_grad for n, b in held.items())
    assert all(p.grad is None for p in after.values())
    assert model.training


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        *((name, mistake) for name in ("llama", "gpt2", "gemma3") for mistake in MISTAKES),
        *((name, mistake) for name in (WINDOWED, "gemma3") for mistake in WINDOW_MISTAKES.values()),
    ],
)
def test_no_mistake_gets_past_the_first_layers(name: str, mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = deep(name)
    assert choose_packing(model, loss, config(), DATA, 0)[0].uses_trie
    mistake(monkeypatch)
    model, loss = deep(name)
    packing, why = choose_packing(model, loss, config(), DATA, 0)
    assert not packing.uses_trie
    assert "of 6 layers it differs from padded" in why
    assert len(stack(model)) == 6


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("adapted", [None, [1], [4, 5]])
def test_no_mistake_gets_past_the_first_layers_of_an_adapted_model(
    adapted: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the first layers have no adapter, the gradients of their norms are compared, and not kept."""
    model, loss = deep("llama", adapter=True, layers=adapted)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert "the first 2 of 6 layers" in choose_packing(model, loss, config("trie"), DATA, 0)[1]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    for mistake in (sees_a_sibling, labels_count_once):
        with monkeypatch.context() as patch:
            mistake(patch)
            model, loss = deep("llama", adapter=True, layers=adapted)
            rows = verification_rows(config(), DATA, None)[0]
            with layers.first_layers(model):
                proof = verified(model, loss, rows)
            assert proof.gradient_distance > 30 * BOUNDS[torch.float32]


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_model_in_16_bits_is_tried_in_fp32_where_its_beginning_is_small(monkeypatch: Any) -> None:
    model, loss = deep("llama")
    model = model.to(torch.bfloat16)
    beginning = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in stack(model)[2:].parameters())
    monkeypatch.setattr("trainer.engine.verify_kernels.MAX_FP32_PARAMETERS", beginning)
    one_label_too_many(monkeypatch)  # small enough to be lost in 16 bits
    assert "in float32; 1.0e-04 is allowed" in choose_packing(model, loss, config(), DATA, 0)[1]


def test_small_models_and_those_with_few_layers_are_tried_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = deep("llama")
    with layers.first_layers(model) as words:
        assert (words, len(stack(model))) == ("", 6)
    monkeypatch.setattr(layers, "MAX_WHOLE_PARAMETERS", 0)
    with layers.first_layers(made("llama", torch.float32)[0]) as words:
        assert words == ""
