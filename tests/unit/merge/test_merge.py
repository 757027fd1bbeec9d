"""A merge that is proved: what is written answers as the live adapter did, or is not there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.adapters import KINDS, base, save_trained
from tests.helpers.architectures import VOCABULARY, tiny
from tests.helpers.processes import ROOT, run
from trainer.config import load
from trainer.config.method import MethodConfig
from trainer.errors import CheckpointError
from trainer.merge.card import model_card
from trainer.merge.merge import MergeResult, check_mergeable, logits_at_positions, merge, state_digests
from trainer.methods import attach, load_adapter, trainable_parameters

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 40))]
QUICK = ("lora", "adalora", "ia3")  # what `make check` tries
LINEAR = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name, keys in KINDS.items()
    if keys.get("name", "lora") in QUICK
]
DTYPES = [torch.float32, torch.bfloat16]
BOTH = [pytest.param(torch.float32, marks=pytest.mark.slow, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


class Plain:
    """A tokenizer that saves nothing but a mark."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def reload(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def card(result: MergeResult) -> str:
    return f"{result.distance}"


def adapted(model: Any, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    """An adapter that does much, as if trained."""
    return spread(attach(cast(model, dtype), MethodConfig(**{"r": 4, **keys}), seed=0))


def cast(model: Any, dtype: torch.dtype) -> Any:
    """As a model is loaded: the frequencies of its positions, a buffer, stay in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def spread(wrapped: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in trainable_parameters(wrapped).items():
        if any(part in name for part in ("lora_B", "lora_E", "embedding_A")):  # what starts at zero
            nn.init.normal_(parameter, std=3.0 if "lora_E" in name else 0.1)
        else:
            parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def experts(dtype: torch.dtype) -> Any:
    """Adapters of 3-D parameters, nested, which on disk are a tensor an expert; and of a linear layer."""
    torch.manual_seed(0)
    keys = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = cast(tiny("mixtral", initializer_range=0.1, num_experts_per_tok=2), dtype)
    return spread(get_peft_model(model, keys, autocast_adapter_dtype=False))


def tied() -> Any:
    torch.manual_seed(0)
    return tiny("gpt2")


LIVE: dict[str, Callable[[torch.dtype], Any]] = {
    "lora": lambda dtype: adapted(base(), dtype),
    "rslora": lambda dtype: adapted(base(), dtype, rslora=True, alpha=3.0),
    "dora": lambda dtype: adapted(base(), dtype, dora=True),
    "adalora": lambda dtype: adapted(base(), dtype, r=None, **KINDS["adalora"]),
    "ia3": lambda dtype: adapted(base(), dtype, r=None, name="ia3"),
    "Conv1D, tied": lambda dtype: adapted(tied(), dtype),
    "Conv1D, ia3": lambda dtype: adapted(tied(), dtype, r=None, name="ia3"),
    "embedding": lambda dtype: adapted(tied(), dtype, target_modules=["wte"]),
    "experts": experts,
}
EACH = [
    pytest.param(name, dtype, marks=[] if (name, dtype) == ("lora", torch.bfloat16) else pytest.mark.slow)
    for name in LIVE
    for dtype in DTYPES
]


@pytest.mark.parametrize("name", LINEAR)
def test_a_merged_model_answers_as_the_live_one(name: str, tmp_path: Path) -> None:
    live = load_adapter(base(), save_trained(tmp_path / "a", MethodConfig(**KINDS[name]))).eval()
    expected = logits_at_positions(live, PROMPTS)
    result = merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert result.distance < 1e-5 < 1e-3 < result.base_distance
    assert result.top_token_agreement == 1.0
    plain = reload(tmp_path / "merged")
    for one, other in zip(logits_at_positions(plain, PROMPTS), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert {f.name for f in (tmp_path / "merged").iterdir()} >= {"README.md", "tokenizer.json", "config.json"}
    assert not (tmp_path / "merged.partial").exists()


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_the_proofs_let_a_right_merge_through(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """And what is on disk is what stock PEFT merges in fp32, rounded once."""
    result = merge(lambda: LIVE[name](dtype), Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert result.base_distance > result.bound
    exact = LIVE[name](dtype).float().merge_and_unload().to(dtype).state_dict()
    found = reload(tmp_path / "merged", dtype).state_dict()
    for key in found.keys() - ({"lm_head.weight"} if name == "embedding" else set()):  # stock PEFT merges it too: tied
        torch.testing.assert_close(found[key], exact[key], rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)


@pytest.mark.parametrize(("name", "dtype"), EACH)
@pytest.mark.parametrize("how", ["scale off by 1 %", "left out"])
def test_one_layer_folded_wrongly_is_found(how: str, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    live = LIVE[name](dtype)
    layers = [module for module in live.modules() if isinstance(module, BaseTunerLayer)]
    layer: Any = layers[len(layers) // 2]
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    right = layer.merge

    def wrong() -> None:
        if how != "left out":
            before = weight.data.clone()
            right()
            weight.data = weight.data + 0.01 * (weight.data - before)

    layer.merge = wrong
    with pytest.raises(CheckpointError, match="of what its adapter does"):
        merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert list(tmp_path.iterdir()) == []


def swap(weights: dict[str, Any]) -> None:
    one, other = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))
    weights[one], weights[other] = weights[other], weights[one]


def flip(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"].view(torch.uint8)[0] ^= 1


def widen(weights: dict[str, Any]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"].double()


def forget(weights: dict[str, Any]) -> None:
    del weights["model.layers.0.self_attn.q_proj.weight"]


def add(weights: dict[str, Any]) -> None:
    weights["model.layers.0.self_attn.q_proj.lora_A"] = torch.ones(1)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (swap, "2 of 21 tensors are not what was folded"),
        (flip, r"model.norm.weight: read back from disk, 1 of 21"),
        (forget, "1 of 21 tensors are not what was folded"),
        (widen, "float64"),
        (add, "bytes of"),
    ],
)
def test_what_is_not_on_disk_as_it_was_folded_is_found(
    spoil: Callable[[dict[str, Any]], None], message: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    def spoilt(folder: Path, dtype: torch.dtype) -> Any:
        weights = load_file(folder / "model.safetensors")
        spoil(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        return reload(folder, dtype)

    with pytest.raises(CheckpointError, match=message):
        merge(lambda: LIVE["lora"](dtype), Plain(), PROMPTS, tmp_path / "merged", spoilt, card)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", BOTH)
def test_right_weights_under_a_wrong_configuration_are_found(dtype: torch.dtype, tmp_path: Path) -> None:
    def spoilt(folder: Path, dtype: torch.dtype) -> Any:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 10.0
        (folder / "config.json").write_text(json.dumps(config))
        return reload(folder, dtype)

    with pytest.raises(CheckpointError, match="from the live adapter's"):
        merge(lambda: LIVE["lora"](dtype), Plain(), PROMPTS, tmp_path / "merged", spoilt, card)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", BOTH)
def test_an_adapter_that_does_nothing_is_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    live = attach(cast(base(), dtype), MethodConfig(r=4), seed=0).eval()
    result = merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert result.base_distance == result.distance == 0


def test_what_16_bits_have_no_room_for_is_found(tmp_path: Path) -> None:
    live = LIVE["lora"](torch.bfloat16)
    next(p for n, p in live.named_parameters() if "lora_B" in n).data.fill_(3e38)
    with pytest.raises(CheckpointError, match="folded"):
        merge(lambda: live, Plain(), PROMPTS, tmp_path / "merged", reload, card)
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_embedding_is_untied_from_the_output_layer(tmp_path: Path) -> None:
    before = state_digests(tied())["lm_head.weight"]
    assert before == state_digests(tied())["transformer.wte.weight"]
    merge(lambda: LIVE["embedding"](torch.float32), Plain(), PROMPTS, tmp_path / "merged", reload, card)
    after = state_digests(reload(tmp_path / "merged"))
    assert after["lm_head.weight"] == before != after["transformer.wte.weight"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_tied_weights_are_written_once_and_read_back_tied(tmp_path: Path) -> None:
    merge(lambda: LIVE["Conv1D, tied"](torch.float32), Plain(), PROMPTS, tmp_path / "merged", reload, card)
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert ("lm_head.weight" in names, "transformer.wte.weight" in names) == (False, True)
    again = reload(tmp_path / "merged")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight


def test_a_grown_vocabulary_is_kept(tmp_path: Path) -> None:
    def live() -> Any:
        model = base()
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        return adapted(model)

    prompts = [[5, VOCABULARY + 2, 7]]
    assert merge(live, Plain(), prompts, tmp_path / "merged", reload, card).distance < 1e-5
    assert len(reload(tmp_path / "merged").get_input_embeddings().weight) == VOCABULARY + 3


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        merge(base, Plain(), PROMPTS, tmp_path, reload, card)


@pytest.mark.parametrize("method", ["bottleneck", "prompt", "prefix", "full"])
def test_what_cannot_be_merged_is_refused_with_the_reason(method: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be merged"):
        check_mergeable(load([f"method={method}"]))


def test_the_card_tells_data_method_and_figures() -> None:
    config = load(["experiment=demo", "method.r=8"])
    config.data.path = "/somewhere/secret/rows.jsonl"
    summary = {"steps": 12, "metrics": {"eval_loss": 1.25}}
    found = model_card(config, summary, MergeResult(1e-2, 5e-2, 0.3, 0.98, 16, layers=7, tensors=21))
    for message in (
        "rows.jsonl",
        "LoRA, r = 8",
        "12 updates",
        "eval_loss | 1.25",
        "1.0e-02",
        "3.0e-01",
        "98.0 %",
        "21 te",
    ):
        assert message in found
    assert "secret" not in found
    assert "score" not in model_card(config, {"steps": 1, "metrics": {}}, MergeResult(0, 1, 0, 1, 1, 1, 1))


MEMORY = """
import sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from tests.helpers.architectures import tiny
from tests.unit.merge.test_merge import Plain, card, reload
from trainer.merge.merge import merge
from trainer.methods import load_adapter

def make(folder, width, layers):
    torch.set_default_dtype(torch.bfloat16)
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers}
    model = tiny("llama", vocab_size=8192, initializer_range=0.02, **sizes)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"), autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(folder / "adapter")
    return sum(p.nbytes for p in model.parameters())

def merge_in(folder):
    live = lambda: load_adapter(reload(folder / "base", torch.bfloat16), folder / "adapter").eval()
    merge(live, Plain(), [[5, 6, 7, 8]], folder / "merged", reload, card)

def resident(name):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])

folder = Path(sys.argv[1])
if sys.argv[2] == "make":
    print(make(folder / "small", 64, 1), make(folder / "big", 1024, 12))
else:
    merge_in(folder / "small")  # whatever is imported late is there now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at zero
    before = resident("VmRSS")
    merge_in(folder / "big")
    print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: reads memory peaks from /proc")
def test_one_copy_of_the_model_is_held(tmp_path: Path) -> None:
    """Of 300 MB, mapped files counted: neither a second copy beside the mapped one, nor one in the writing."""
    made, merged = (
        run([sys.executable, "-c", MEMORY, tmp_path, do], env={"PYTHONPATH": str(ROOT)}).output.splitlines()[-1]
        for do in ("make", "merge")
    )
    size, peak = int(made.split()[1]), int(merged)
    assert size > 2.8e8
    assert peak < 1.3 * size, f"{peak / size:.2f} times the model"
