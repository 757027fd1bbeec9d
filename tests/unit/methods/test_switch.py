"""Adapters of every kind taken off and put on: to the bit what a fresh load gives, and the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.helpers.adapters import IDS, KINDS, base, logits, save_trained
from tests.helpers.architectures import tiny
from trainer.config.method import MethodConfig
from trainer.config.schema import ModelConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.methods import AdapterSwitcher, load_adapter, virtual_tokens
from trainer.models.loading import load_model

CPU = torch.device("cpu")
NAMES = [
    *("lora", "dora", "pissa, rslora", "adalora", "ia3", "ia3, one layer", "prompt", "prefix", "prefix, projected"),
    *("bottleneck", "bottleneck, pfeiffer"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each kind, all for the same base, which has biases."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_trained(folder / str(k), MethodConfig(**KINDS[name])) for k, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of ``test_method_kinds``, on disk."""
    folder = tmp_path_factory.mktemp("base")
    base().save_pretrained(folder)
    return folder


def load(folder: Path, bits: int = 16) -> Any:
    keys = ModelConfig(dtype="fp32")
    return load_model(str(folder), keys, MethodConfig(r=4, bits=bits), torch.float32, CPU, zero_stage=0).eval()


def test_every_kind_after_every_other_is_what_a_fresh_load_gives(folders: dict[str, Path], base_folder: Path) -> None:
    switch = AdapterSwitcher(load(base_folder), {**folders, "base": None})
    before = {n: p.clone() for n, p in switch.model.state_dict().items()}
    alone = logits(load(base_folder))
    expected = {n: logits(load_adapter(load(base_folder), f).eval()) for n, f in folders.items()}
    for one, other in zip(NAMES, [*NAMES[4:], *NAMES[:4]], strict=True):
        for name in (other, one):
            assert torch.equal(logits(switch.use(name)), expected[name]), (one, other)
            assert switch.name == name
    assert torch.equal(logits(switch.use("base")), alone)
    after = switch.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert len({tuple(x.flatten().tolist()) for x in (alone, *expected.values())}) == 1 + len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_on_a_quantised_base(bits: int, folders: dict[str, Path], base_folder: Path) -> None:
    names = ["lora", "ia3", "prompt", "prefix", "bottleneck", "adalora", *(["dora"] if bits == 4 else [])]
    switch = AdapterSwitcher(load(base_folder, bits), {**{n: folders[n] for n in names}, "base": None})
    alone = logits(switch.model)
    for one, other in zip(names, [*names[3:], *names[:3]], strict=True):
        first, _, again = (logits(switch.use(name)) for name in (one, other, one))
        assert torch.equal(first, again), (one, other)
        assert torch.equal(first, logits(load_adapter(load(base_folder, bits), folders[one]).eval())), one
        assert not torch.equal(first, alone)
    assert torch.equal(logits(switch.use("base")), alone)
    if bits == 8:
        switch.adapters["dora"] = folders["dora"]
        with pytest.raises(CheckpointError, match=r"loses the scales of a base in 8 bits.*--bits 4"):
            switch.use("dora")


def test_biases_that_were_trained_are_given_back(tmp_path: Path) -> None:
    def biased() -> Any:
        torch.manual_seed(1)
        return tiny("llama", attention_bias=True).eval()

    for name in ("all", "lora_only"):
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], bias=name)
        model = get_peft_model(biased(), config)
        for full, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "bias" in full or "lora" in full
                parameter.data.normal_()
        model.save_pretrained(str(tmp_path / name))
    folders = {name: tmp_path / name for name in ("all", "lora_only")}
    switch = AdapterSwitcher(biased(), {**folders, "base": None})
    for name in ("all", "base", "lora_only", "all", "lora_only", "base"):
        fresh = load_adapter(biased(), folders[name]).eval() if name != "base" else biased()
        assert torch.equal(logits(switch.use(name)), logits(fresh)), name


def answers(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=True)


def test_answers_are_those_of_a_fresh_load(folders: dict[str, Path], base_folder: Path) -> None:
    """PEFT's wrapper leaves its own way to prepare inputs on the base when it has generated."""
    names = ["prompt", "base", "prefix", "lora", "prompt", "bottleneck"]
    switch = AdapterSwitcher(load(base_folder), {**folders, "base": None})
    for name in names:
        fresh = load(base_folder) if name == "base" else load_adapter(load(base_folder), folders[name]).eval()
        assert torch.equal(answers(switch.use(name)), answers(fresh)), name


def test_what_fails_leaves_the_base_alone(folders: dict[str, Path], base_folder: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in folders["lora"].iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    metadata = json.loads((torn / "adapter_config.json").read_text())
    (torn / "adapter_config.json").write_text(json.dumps({**metadata, "r": 3}))
    pissa = tmp_path / "pissa"
    pissa.mkdir()
    (pissa / "adapter_config.json").write_text(json.dumps({**metadata, "init_lora_weights": "pissa"}))
    every = {"torn": torn, "pissa": pissa, "lora": folders["lora"], "base": None}
    switch = AdapterSwitcher(load(base_folder), every)
    expected = logits(switch.use("lora"))
    for name, message in (("torn", "does not fit"), ("pissa", "would change the base")):
        with pytest.raises(CheckpointError, match=message):
            switch.use(name)
        assert switch.name is None
        assert torch.equal(logits(switch.model), logits(load(base_folder)))
        assert torch.equal(logits(switch.use("lora")), expected)
    with pytest.raises(ConfigError, match="one of torn, pissa, lora, base"):
        switch.use("lorra")
    assert switch.name == "lora", "a name that is not there changes nothing"


def test_virtual_tokens_are_counted(folders: dict[str, Path], base_folder: Path) -> None:
    switch = AdapterSwitcher(load(base_folder), {**folders, "base": None})
    found = {name: virtual_tokens(switch.use(name)) for name in ("base", "lora", "prompt", "prefix", "bottleneck")}
    assert found == {"base": 0, "lora": 0, "prompt": 3, "prefix": 3, "bottleneck": 0}
