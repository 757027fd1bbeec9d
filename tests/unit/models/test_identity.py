"""Which model a base is: its record beside an adapter, and the fingerprint that tells it from another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer.config.method import MethodConfig
from trainer.config.schema import ModelConfig
from trainer.errors import CheckpointError
from trainer.methods import attach, load_adapter, save_adapter, trainable_parameters
from trainer.methods.base_record import BASE_FILE, BaseRecord, read_base, write_base
from trainer.models.embedded import EMBEDDED, MARKER
from trainer.models.identity import describe_base, fingerprint

COMMIT = "0123456789" * 4


def copied(tiny_model: Path, to: Path) -> Path:
    """A model folder of somebody's own: nothing says that it was embedded."""
    shutil.copytree(tiny_model, to)
    (to / MARKER).unlink()
    return to


def in_hub_cache(tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the model into the hub's cache as org/tiny; return the folder of its snapshot."""
    place = cache / "models--org--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(transformers.utils.hub, "TRANSFORMERS_CACHE", str(cache), raising=False)
    return copied(tiny_model, place / "snapshots" / COMMIT)


def saved(folder: Path, model: Any, base: BaseRecord) -> dict[str, Any]:
    adapted = attach(model, MethodConfig(r=2), seed=0, total_steps=1)
    with torch.no_grad():
        for parameter in trainable_parameters(adapted).values():
            parameter.normal_()
    save_adapter(adapted, folder, {n: p.detach() for n, p in trainable_parameters(adapted).items()}, base=base)
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_a_fingerprint_is_of_the_weights_not_of_their_files(tiny_model: Path, tmp_path: Path) -> None:
    one = copied(tiny_model, tmp_path / "one")
    before = fingerprint(one)
    assert before is not None
    tensors = load_file(one / "model.safetensors")
    names = sorted(tensors)
    cut = copied(tiny_model, tmp_path / "cut")
    (cut / "model.safetensors").unlink()
    for part in (0, 1):
        save_file({name: tensors[name] for name in names[part::2]}, cut / f"model-{part}.safetensors")
    config = json.loads((cut / "config.json").read_text())
    config["text_config"] = {"hidden_size": 8}
    (one / "config.json").write_text(json.dumps(config))
    before = fingerprint(one)
    of_another = {"transformers_version": "9", "use_cache": False}
    (cut / "config.json").write_text(
        json.dumps({**config, **of_another, "text_config": {"hidden_size": 8, **of_another}})
    )
    assert fingerprint(cut) == before
    changed = [
        {**tensors, names[3]: tensors[names[3]] + 1e-3},
        {**tensors, names[3]: tensors[names[3]].to(torch.bfloat16)},
        {name: tensors[name] for name in names[1:]},
    ]
    found = {before}
    for content in changed:
        save_file(content, one / "model.safetensors")
        found.add(fingerprint(one))
    assert len(found) == 4
    shutil.copy(tiny_model / "model.safetensors", one)
    (one / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    assert fingerprint(one) not in found


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b'{"a": {"dtype": 1}', b"\2\0\0\0\0\0\0\0[]"]
)
def test_what_is_no_model_has_none(tiny_model: Path, tmp_path: Path, content: bytes) -> None:
    one = copied(tiny_model, tmp_path / "one")
    (one / "model.safetensors").write_bytes(content)
    assert fingerprint(one) is None
    (one / "model.safetensors").unlink()
    assert fingerprint(one) is not None
    (one / "config.json").write_bytes(b"[")
    assert fingerprint(one) is None
    assert fingerprint(tmp_path / "nowhere") is None


def test_an_embedded_model_is_known_wherever_its_cache_is(tiny_model: Path, tmp_path: Path) -> None:
    by_name, by_path = (describe_base(ModelConfig(name_or_path=n), str(tiny_model)) for n in ("tiny", str(tiny_model)))
    assert by_name == by_path
    assert (by_name.name, by_name.kind, by_name.hub_id, by_name.path) == ("tiny", "embedded", None, str(tiny_model))
    (tmp_path / MARKER).write_text(json.dumps({"recipe": EMBEDDED["smollm2_135m"].recipe}))
    smollm2 = describe_base(ModelConfig(name_or_path="smollm2_135m"), str(tmp_path))
    assert (smollm2.name, smollm2.stock_name) == ("smollm2_135m", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize("name", ["lora", "bottleneck"])
def test_peft_is_told_where_the_base_is(name: str, model: Any, tmp_path: Path) -> None:
    record = BaseRecord("smollm2_135m", "embedded", "HuggingFaceTB/SmolLM2-135M-Instruct", path="/cache/x")
    method = (
        MethodConfig(r=2)
        if name == "lora"
        else MethodConfig(name="bottleneck", reduction_factor=4, placement="houlsby", activation="relu")
    )
    adapted = attach(model, method, seed=0, total_steps=1)
    weights = {n: p.detach() for n, p in trainable_parameters(adapted).items()}
    save_adapter(adapted, tmp_path, weights, base=record)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == record.hub_id
    assert read_base(tmp_path) == record


def test_stock_peft_finds_a_base_of_the_hub_by_id_and_commit(
    tiny_model: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = in_hub_cache(tiny_model, tmp_path / "hub", monkeypatch)
    record = describe_base(ModelConfig(name_or_path="org/tiny"), "org/tiny")
    assert (record.kind, record.hub_id, record.revision, record.path) == ("hub", "org/tiny", COMMIT, str(snapshot))
    assert record.fingerprint == fingerprint(tiny_model)
    written = saved(tmp_path / "adapter", model, record)
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/tiny", COMMIT)
    stock: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ours: Any = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    ids = torch.arange(2, 30)[None]
    assert torch.equal(stock(ids).logits, ours(ids).logits)


def test_both_bases_are_named_with_the_whole_reason(tiny_model: Path, model: Any, tmp_path: Path) -> None:
    saved(tmp_path / "adapter", model, describe_base(ModelConfig(name_or_path="tiny"), str(tiny_model)))
    config = model.config
    other = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), "hidden_size": 32}))
    other.save_pretrained(tmp_path / "wider")
    with pytest.raises(CheckpointError) as caught:
        load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "wider"), tmp_path / "adapter")
    told = str(caught.value)
    assert f"does not fit the base model {tmp_path}/wider: it was trained on tiny (size mismatch for " in told
    assert "torch.Size([2, 64])" in told
    assert "torch.Size([2, 32])" in told
    assert "more of the kind)" in told
    assert told.endswith("→ use its own base: model.name_or_path=tiny")
    assert "\n" not in told


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "[" * 100_000, '{"name": "x"}', '{"name": 1, "kind": "hub"}', '{"name": "x", "kind": "other"}',
     '{"name": "", "kind": "hub"}', '{"name": "x", "kind": "hub", "path": {}}', " " * 200_000],
)  # fmt: skip
def test_a_record_that_is_none_is_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / BASE_FILE).write_text(text)
    assert read_base(tmp_path) is None


def test_a_record_holds_no_secret(tmp_path: Path) -> None:
    secret = "hf_" + "aB3" * 8
    write_base(tmp_path, BaseRecord(f"/models/{secret}", "folder", path=f"/models/{secret}"))
    assert secret not in (tmp_path / BASE_FILE).read_text()
