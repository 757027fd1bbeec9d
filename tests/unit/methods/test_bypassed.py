"""Layers whose weight is read past them; endings of names that mean some modules and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from tests.helpers.architecture_table import DENSE, RECURRENT
from tests.helpers.architectures import random_model
from trainer.config.method import MethodConfig
from trainer.errors import ConfigError
from trainer.methods import attach, trainable_parameters
from trainer.methods.bypassed import bypassed_layers, weights_read_by
from trainer.methods.targets import describe_left_out, shortest_endings, target_names


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.asked, self.called, self.sharded, self.first = (nn.Linear(4, 4) for _ in range(5))
        self.pretraining_tp = 1
        self.init_first()

    def init_first(self) -> None:
        nn.init.ones_(self.first.weight)

    def forward(self, x: Any) -> Any:
        if self.pretraining_tp > 1:
            return x @ self.sharded.weight
        return self.called(x.to(self.asked.weight.dtype)) + self.asked(x) + self.inner(x)

    def inner(self, x: Any) -> Any:
        return nn.functional.linear(x, self.read.weight)


class Child(Mixer):
    """Inherits what it reads."""


def test_what_a_class_reads() -> None:
    assert weights_read_by(Mixer) == weights_read_by(Child) == {"read"}
    assert weights_read_by(nn.Linear) == frozenset()
    model = nn.ModuleDict({"layer": Child(), "other": nn.Linear(4, 4)})
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert bypassed_layers(model, names) == {"layer.read": "Child"}


@pytest.mark.parametrize("name", [n for n, row in RECURRENT.items() if row.left_out])
def test_what_is_left_out_is_said_and_refused_by_name(name: str) -> None:
    row = RECURRENT[name]
    with torch.device("meta"):
        model = random_model(row)
    method = MethodConfig(r=2)
    said = describe_left_out(model, method)
    assert said is not None
    assert all(each in said for each in row.left_out)
    assert set(target_names(model, "all_linear")) == row.linear
    for each in row.left_out - {"gate_up_proj_adapter_list"}:
        with pytest.raises(
            ConfigError, match=rf"{each}: would not be trained everywhere: \w+ reads the weight"
        ) as caught:
            target_names(model, ["in_proj", each])
        assert all(works in str(caught.value) for works in row.linear)
    adapted = attach(model, method, seed=0)
    assert describe_left_out(adapted, method) == said, "with adapters attached too"
    assert describe_left_out(model, MethodConfig(r=2, target_modules=["in_proj"])) is None
    assert describe_left_out(model, MethodConfig(name="prompt", virtual_tokens=2)) is None
    assert {full.split(".lora_")[0].rpartition(".")[2] for full in trainable_parameters(adapted)} == row.linear


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "mamba2"])
@pytest.mark.parametrize("wanted", ["attention", "attention_min"])
def test_without_attention_its_sets_are_refused(name: str, wanted: str) -> None:
    with torch.device("meta"):
        model = random_model(RECURRENT[name])
    with pytest.raises(ConfigError, match=rf"{wanted}: finds no attention of names that are known .* in_proj \(×2\)"):
        target_names(model, wanted)


def test_nothing_is_left_out_of_dense_models() -> None:
    for name in ("bloom", "falcon"):
        with torch.device("meta"):
            assert describe_left_out(random_model(DENSE[name]), MethodConfig(r=2)) is None


NAMES = st.lists(st.lists(st.sampled_from("abc0"), min_size=1, max_size=4).map(".".join), min_size=1, unique=True)


@given(names=NAMES, data=st.data())
def test_endings_mean_the_wanted_modules_and_no_others(names: list[str], data: st.DataObject) -> None:
    """By PEFT's own rule. A name that another ends in cannot be told apart from it: it is left out."""
    wanted = set(data.draw(st.lists(st.sampled_from(names), min_size=1)))
    endings = shortest_endings(names, wanted)
    found = {n for n in names if endings and check_target_module_exists(LoraConfig(target_modules=endings), n)}
    hidden = {name for name in wanted if any(o.endswith(f".{name}") and o not in wanted for o in names)}
    assert found == wanted - hidden
