"""At its start a group is compared with a trial alone: what mixes the rows of trials, or takes too much, is found."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import load
from trainer.data.batching.packing import Packing
from trainer.data.batching.rank_split import Limits
from trainer.data.load import load_data
from trainer.engine.verification import Verification
from trainer.errors import TooManyTrialsError
from trainer.kernels.label_loss import LabelLoss
from trainer.kernels.trial_lora import ActiveTrials, patch_trial_linears
from trainer.methods.attach import attach_trials
from trainer.models.loading import load_model, load_tokenizer
from trainer.together import build
from trainer.together.verify import verify_together


def verified(tiny_model: Path, uses_trie: bool, spoil: Any = None, deepen: Any = None, *overrides: str) -> Verification:
    """Verify three trials on the tiny model; ``spoil`` is called with it before, ``deepen`` with its base."""
    config = load(["debug=tiny", "log=off", "method.r=4", f"model.name_or_path={tiny_model}", *overrides])
    tokenizer = load_tokenizer(str(tiny_model), config.model)
    data = load_data(config, tokenizer)
    base = load_model(str(tiny_model), config.model, config.method, torch.float32, torch.device("cpu"), 0)
    if deepen is not None:
        deepen(base)
    model = attach_trials(base, {f"trial_{k}": (config.method, k) for k in range(3)})
    loss = LabelLoss(model)
    active = ActiveTrials(("trial_0", "trial_1", "trial_2"))
    patch = patch_trial_linears(model, active)
    assert patch is not None
    if spoil is not None:
        spoil(model)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    packing = Packing(uses_trie, Limits(None, 4096), tokenizer.pad_token_id)
    found = verify_together(model, loss, config, data, packing, patch, active)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained, "all is as it was"
    return found


@pytest.mark.parametrize("uses_trie", [False, True])
def test_trials_that_do_not_touch_each_other_hold(tiny_model: Path, uses_trie: bool) -> None:
    found = verified(tiny_model, uses_trie)
    assert found.holds, found
    assert found.gradient_distance < 1e-5, found


class SortedRows(nn.Module):
    """A layer that hands its rows to the next one in another order, as experts do that choose their tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        order = torch.arange(len(flat) - 1, -1, -1)
        out: Tensor = self.layer(flat[order].view_as(x)).reshape(len(flat), -1)
        return out[order].view(*x.shape[:-1], -1)


def test_a_layer_that_mixes_the_rows_is_found(tiny_model: Path) -> None:
    def spoil(model: Any) -> None:
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.up_proj = SortedRows(mlp.up_proj)

    found = verified(tiny_model, True, spoil)
    assert not found.holds, found


@pytest.mark.parametrize(("adapted", "seen"), [("null", {0, 1}), ("[4]", {0, 1, 2, 3, 4})])
def test_layers_alike_are_verified_on_the_first_ones(tiny_model: Path, adapted: str, seen: set[int]) -> None:
    run = set()

    def deepen(base: Any) -> None:
        layers = base.model.layers
        layers.extend(copy.deepcopy(layers[0]) for _ in range(5 - len(layers)))
        base.config.num_hidden_layers = 5
        for place, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, place=place: run.add(place))

    found = verified(tiny_model, True, None, deepen, f"method.layers={adapted}")
    assert run == seen, "all of them where the last trial adapts none of the first ones"
    assert found.holds, found


def test_trials_that_leave_no_room_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    build.check_room(8, 100 * gib, torch.device("cpu"))
    monkeypatch.setattr(build, "device_bytes", lambda device: 80 * gib)
    build.check_room(8, 60 * gib, torch.device("cuda"))
    with pytest.raises(TooManyTrialsError, match=r"sweep.fuse=8: takes 70.0 GiB .* has 80.0 GiB → sweep.fuse=4"):
        build.check_room(8, 70 * gib, torch.device("cuda"))


@pytest.mark.parametrize("looks_back", [False, True])
def test_layers_that_look_at_each_other_are_computed_for_each_trial(
    tiny_model: Path, looks_back: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer adds what the first one gave, as models whose layers share keys: it has fewer rows, if shared."""
    config = load(["debug=tiny", "log=off", "method.r=4", "method.layers=[1]", f"model.name_or_path={tiny_model}"])
    tokenizer = load_tokenizer(str(tiny_model), config.model)
    base: Any = load_model(str(tiny_model), config.model, config.method, torch.float32, torch.device("cpu"), 0)
    kept: list[Tensor] = []
    first, last = base.model.layers
    first.register_forward_hook(lambda _, args, out: kept.append(out))
    if looks_back:
        last.register_forward_hook(lambda _, args, out: out + kept[-1])
    model = attach_trials(base, {f"trial_{k}": (config.method, k) for k in range(3)})
    data, loss = load_data(config, tokenizer), LabelLoss(model)
    monkeypatch.setattr(build.distributed, "from_main", lambda found: found)
    packing = Packing(False, Limits(None, 4096), tokenizer.pad_token_id)
    with caplog.at_level(logging.INFO):
        active = build._put_in_one_forward(model, loss, dict.fromkeys(model.peft_config, config), data, packing)
    assert ("computed for each trial" in caplog.text) == looks_back
    batch = packing.collate(data.train.tokens(range(2)), range(2))
    assert active.shares_layers != looks_back
    with active.on_same_tokens(), torch.no_grad():
        assert len(loss(model, batch, trials=3)) == 3
    assert len(kept[-1]) == (6 if looks_back else 2)
