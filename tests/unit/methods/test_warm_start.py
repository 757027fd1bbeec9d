"""A warm start from a saved adapter: stock PEFT's logits before the first step, or a refusal that says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.helpers.adapters import KINDS, adalora_model, base, logits, save_trained
from tests.helpers.architectures import tiny
from tests.helpers.warm import afina
from trainer.config import load, run_folder
from trainer.config.method import MethodConfig
from trainer.config.rules.method import changes_base, check_method
from trainer.errors import CheckpointError, ConfigError
from trainer.methods import attach, save_adapter, trainable_parameters
from trainer.methods.load import ADAPTER_FILE, load_adapter
from trainer.methods.parameters import digests
from trainer.tracking.files import read_metrics, read_summary

WARM_STARTED = [
    name for name, keys in KINDS.items() if not changes_base(MethodConfig(**keys)) and not keys.get("prefix_projection")
]


def saved(folder: Path, **keys: Any) -> Path:
    """An adapter some steps after its start."""
    return save_trained(folder, MethodConfig(**keys))


def warm_started(folder: Path, onto: Any = None, **keys: Any) -> Any:
    kind = MethodConfig(**{**keys, "adapter": str(folder)})
    check_method(kind)
    return attach(onto or base(), kind, seed=9, total_steps=10).eval()


@pytest.mark.parametrize("name", WARM_STARTED)
def test_it_starts_as_the_adapter_that_was_saved(name: str, tmp_path: Path) -> None:
    keys = KINDS[name]
    folder = saved(tmp_path, **keys)
    model = warm_started(folder, **keys)
    loads = load_adapter if keys.get("name") == "bottleneck" else PeftModel.from_pretrained
    assert torch.equal(logits(model), logits(loads(base(), folder).eval()))
    fresh = attach(base(), MethodConfig(**keys), seed=9, total_steps=10)
    mine, initial = trainable_parameters(model), trainable_parameters(fresh)
    assert list(mine) == list(initial), "it must train what a fresh run trains"
    assert [p.dtype for p in mine.values()] == [p.dtype for p in initial.values()]
    assert digests(mine) != digests(initial)
    logits_of = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3)).logits
    logits_of.square().sum().backward()
    assert all(p.grad is not None for p in mine.values())


def test_in_16_bits_it_is_the_saved_one_to_the_bit(tmp_path: Path) -> None:
    keys = KINDS["lora"]
    model = attach(base().to(torch.bfloat16), MethodConfig(**keys), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, tmp_path, {n: p.detach() for n, p in trainable_parameters(model).items()})
    again = warm_started(tmp_path, base().to(torch.bfloat16), **keys)
    assert digests(trainable_parameters(again)) == digests(trainable_parameters(model))


def test_pruned_ranks_start_fresh(tmp_path: Path) -> None:
    model = adalora_model()
    for name, parameter in trainable_parameters(model).items():
        if "lora_E" in name:
            parameter.data.normal_()
            parameter.data[::2] = 0
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): parameter.ne(0).flatten().tolist()
        for name, parameter in trainable_parameters(model).items()
        if "lora_E" in name
    }
    expected = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    save_adapter(model, tmp_path, expected)
    keys = {**KINDS["adalora"], "target_modules": ["q_proj", "v_proj"]}
    again = warm_started(tmp_path, **keys)
    stock = PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    torch.testing.assert_close(logits(again), logits(stock), rtol=1e-5, atol=1e-6)
    for name, parameter in trainable_parameters(again).items():
        if "lora_E" in name:
            assert torch.equal(parameter, expected[name])
        else:
            assert parameter.ne(0).all(), "a rank that is all zero could never be trained again"


def test_a_prefix_from_an_mlp_is_warm_started_without_it(tmp_path: Path) -> None:
    keys = KINDS["prefix, projected"]
    folder = saved(tmp_path, **keys)
    with pytest.raises(ConfigError, match=r"not the MLP that made it.*prefix_projection=false"):
        warm_started(folder, **keys)
    model = warm_started(folder, **KINDS["prefix"])
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), str(folder)).eval()))


def test_an_adapter_that_started_in_the_base_is_warm_started_at_twice_the_rank(tmp_path: Path) -> None:
    folder = saved(tmp_path, **KINDS["pissa"])
    with pytest.raises(ConfigError, match=r"method\.init=pissa takes the start out.*double method\.r"):
        warm_started(folder, **KINDS["pissa"])
    with pytest.raises(ConfigError, match=r"^method\.r=4: .* has 8 → method\.r=8 method\.alpha=16$"):
        warm_started(folder, **KINDS["lora"])
    model = warm_started(folder, r=8, alpha=16.0)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base(), str(folder)).eval()))


ALL = {"r": 4}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"name": "ia3"}, ALL, r"method\.adapter=.* is of IA3, and this run trains LoRA → method=ia3$"),
    (ALL, KINDS["adalora"], r"is of LoRA, and this run trains AdaLoRA → method=lora$"),
    (KINDS["bottleneck"], KINDS["prompt"], r"method=bottleneck$"),
    ({"r": 2}, ALL, r"method\.r=4: .* has 2 → method\.r=2 method\.alpha=4$"),
    ({"r": 4, "alpha": 3.5}, ALL, r"method\.alpha=8\S*: .* has 3\.5 → method\.alpha=3\.5$"),
    ({"r": 4, "dora": True}, ALL, r"method\.dora=false: .* has true → method\.dora=true$"),
    ({"r": 4, "rslora": True}, ALL, r"method\.rslora=false: .* → method\.rslora=true$"),
    ({"r": 4, "bias": "lora_only"}, ALL, r"method\.bias=none: .* → method\.bias=lora_only$"),
    ({"r": 4, "rank_pattern": {"q_proj": 2}}, ALL, r"method\.rank_pattern=.*→ 'method\.rank_pattern=\{q_proj:2\}'$"),
    (
        {"r": 4, "target_modules": "attention_min"},
        ALL,
        r"is on q_proj, v_proj → 'method\.target_modules=\[q_proj,v_proj\]'$",
    ),
    ({"r": 4, "layers": [1]}, ALL, r"method\.layers=\[0,1\]: .* is in others: \[1\]"),
    (KINDS["adalora"], {**KINDS["adalora"], "init_r": 5}, r"method\.init_r=5: .* → method\.init_r=6 method\.alpha=12$"),
    (KINDS["ia3, one layer"], {"name": "ia3"}, r"is on down_proj, k_proj, v_proj → 'method\.target_modules="),
    (KINDS["prompt"], {**KINDS["prompt"], "virtual_tokens": 4}, r"method\.virtual_tokens=4: .* has 3 →"),
    (KINDS["prefix"], {**KINDS["prefix"], "virtual_tokens": 4}, r"method\.virtual_tokens=4: .* has 3 →"),
    (KINDS["bottleneck"], {**KINDS["bottleneck"], "activation": "gelu"}, r"→ method\.activation=relu$"),
    (KINDS["bottleneck"], {**KINDS["bottleneck"], "reduction_factor": 8}, r"→ method\.reduction_factor=4$"),
    (KINDS["bottleneck, pfeiffer"], {**KINDS["bottleneck, pfeiffer"], "layers": None}, r"→ 'method\.layers=\[1\]'$"),
]


@pytest.mark.parametrize(("was", "now", "message"), REFUSED)
def test_what_means_something_else_is_refused(
    was: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, **was)
    with pytest.raises(ConfigError, match=message) as caught:
        warm_started(folder, **now)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lora", "adalora", "ia3", "prompt", "prefix", "bottleneck"])
def test_another_base_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, **KINDS[name])
    other = tiny("llama", hidden_size=64)
    with pytest.raises(ConfigError, match=r"of shape .*its own base|its own method and base"):
        warm_started(folder, other, **KINDS[name])


def test_a_stock_adapter_is_taken_and_one_left_unconverted_is_not(tmp_path: Path) -> None:
    names = ["q_proj", "v_proj"]
    for start in (True, "pissa", "olora"):
        torch.manual_seed(3)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=names, init_lora_weights=start)
        model = get_peft_model(base(), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(str(tmp_path))
        if start is True:
            again = warm_started(tmp_path, r=4, target_modules=names)
            assert torch.equal(logits(again), logits(PeftModel.from_pretrained(base(), str(tmp_path)).eval()))
            continue
        with pytest.raises(ConfigError, match=rf"starts in the base's own weights \({start}\)"):
            warm_started(tmp_path, r=4, target_modules=names)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, **ALL)
    tensors = load_file(folder / ADAPTER_FILE)
    save_file({n: t for n, t in tensors.items() if "lora_A" in n}, folder / ADAPTER_FILE)
    with pytest.raises(ConfigError, match="has other tensors than this run"):
        warm_started(folder, **ALL)
    (folder / ADAPTER_FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        warm_started(folder, **ALL)
    metadata = json.loads((folder / "adapter_config.json").read_text())
    for text, message in (("{", "cannot be read"), ("{}", "names no peft_type")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            warm_started(folder, **ALL)
    (folder / "adapter_config.json").write_text(json.dumps({**metadata, "peft_type": "VERA"}))
    with pytest.raises(ConfigError, match="of a kind that is not trained here"):
        warm_started(folder, **ALL)


def test_the_folder_is_found_as_data_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "first" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    given = ("runs/first", "runs/first/adapter", "first", str(folder), "runs/../runs/first")
    configs = [load(["debug=tiny", f"method.adapter={path}"]) for path in given]
    assert {config.method.adapter for config in configs} == {str(folder)}
    assert len({run_folder(config) for config in configs}) == 1
    assert run_folder(configs[0]) != run_folder(load(["debug=tiny"])), "it changes the result"
    (tmp_path / "runs" / "whole" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "whole" / "model" / "config.json").write_text("{}")
    (tmp_path / "runs" / "short").mkdir()
    (tmp_path / "runs" / "short" / "config.yaml").write_text("{}")
    for path, message in (
        ("runs/firts", r"holds no adapter_config\.json .*→ did you mean runs/first\?$"),
        ("runs/whole", r"trained all weights.*model\.name_or_path=.*runs/whole/model$"),
        ("runs/short", r"has not finished"),
        ("''", r"must be a run or adapter folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(["debug=tiny", f"method.adapter={path}"])
    with pytest.raises(ConfigError, match=r"method\.adapter=first: has no meaning for full fine-tuning"):
        load(["debug=tiny", "method=full", "method.adapter=first"])


@pytest.mark.slow
def test_a_run_starts_where_another_ended(tmp_path: Path) -> None:
    """Every step sees all rows, which are the held-out ones too: the loss after the last step is the evaluation's."""
    rows = [{"instruction": f"Say {word}.", "output": word * 3} for word in "abcdefgh"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["debug=tiny", f"data.path={data}", f"data.validation={data}", "data.max_rows=null", "eval.metrics=[loss]"]
    keys += ["batch.global_size=8", "batch.epochs=4", "schedule=constant", "schedule.warmup_ratio=0"]
    keys += ["optim.learning_rate=0.01", "eval.max_rows=null"]
    afina("train", *keys, "run.name=first", cwd=tmp_path)
    afina("train", *keys, "run.name=second", "method.adapter=runs/first", "batch.micro_size=3", cwd=tmp_path)
    first, second = (read_summary(tmp_path / "runs" / name) for name in ("first", "second"))
    assert first is not None
    assert second is not None
    after = first["metrics"]["eval_loss"]
    assert after < first["metrics"]["eval_loss_before"] - 0.1, "the first run trained nothing"
    assert second["metrics"]["eval_loss_before"] == pytest.approx(after, rel=1e-5)
    assert read_metrics(tmp_path / "runs" / "second")[1]["loss"] == pytest.approx(after, rel=1e-5)
    assert second["metrics"]["eval_loss"] < after
