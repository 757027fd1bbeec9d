"""Every reach past a library's public interface, tried on the installed library: one check a row of the table."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import trainer.compat
from tests.helpers.architectures import tiny
from tests.helpers.deepspeed_reaches import CASES
from tests.helpers.layout import sources
from tests.helpers.processes import ROOT
from trainer.compat import (
    REACHES,
    Reach,
    bitsandbytes,
    datasets,
    deepspeed,
    hub,
    hydra,
    peft,
    transformers,
    typer,
    wandb,
)
from trainer.compat import torch as compat_torch
from trainer.errors import LaunchError

for module in pkgutil.iter_modules(trainer.compat.__path__):
    importlib.import_module(f"trainer.compat.{module.name}")

Check = Callable[..., None]
CHECKS: dict[str, Check] = {}


def check(*names: str) -> Callable[[Check], Check]:
    """Enter a check of these reaches; it may take ``model``, the tiny Llama, and ``tmp_path``."""

    def enter(function: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, function))
        return function

    return enter


@pytest.mark.parametrize("name", [r.name for r in REACHES if not r.name.startswith("deepspeed")])
def test_the_reach_finds_what_it_reaches_for(name: str, request: pytest.FixtureRequest) -> None:
    wanted = CHECKS[name].__code__.co_varnames[: CHECKS[name].__code__.co_argcount]
    CHECKS[name](**{fixture: request.getfixturevalue(fixture) for fixture in wanted})


@pytest.fixture(scope="module")
def on_deepspeed() -> dict[str, str]:
    command = [sys.executable, "-m", "tests.helpers.deepspeed_reaches"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [r.name for r in REACHES if r.name.startswith("deepspeed")])
def test_the_reach_into_deepspeed_finds_what_it_reaches_for(name: str, on_deepspeed: dict[str, str]) -> None:
    assert on_deepspeed[name] == "", on_deepspeed[name]


@pytest.mark.parametrize("row", REACHES, ids=lambda row: row.name)
def test_a_row_says_why_where_and_how_long(row: Reach) -> None:
    module, _, name = row.name.partition(".")
    function = getattr(importlib.import_module(f"trainer.compat.{module}"), name)
    assert len(function.__doc__.split(".")[0]) > 20
    assert row.private
    assert row.until
    assert row.upstream == "none known" or re.match(
        r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", row.upstream
    )


def test_every_check_has_its_row() -> None:
    assert sorted([*CHECKS, *CASES]) == sorted(row.name for row in REACHES)


def test_nothing_else_reaches_for_a_private_name() -> None:
    """Attributes with an underscore of others than oneself, and imports of such names, are for trainer/compat alone."""
    found = []
    for path in sources("trainer", "launch"):
        if path.is_relative_to(ROOT / "trainer" / "compat"):
            continue
        tree = ast.parse(path.read_text())
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)} | own_attributes(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls" | "ctx")):
                    continue
                case ast.Attribute(attr="_exit" | "_replace"):  # os's and a named tuple's: public, for all their names
                    continue
                case ast.Attribute(attr=name) if is_private(name) and name not in own:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
                case ast.ImportFrom(module=str(where), names=names) if not where.startswith(("trainer", "launch")):
                    found += [f"{path.relative_to(ROOT)}:{node.lineno}: {n.name}" for n in names if is_private(n.name)]
    assert not found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_attributes(tree: ast.AST) -> set[str]:
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "self"}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("gone", ["overflow", "optimizer", "flat", "cur_scale"])
def test_a_changed_optimizer_stops_the_run_at_its_start(stage: int, gone: str) -> None:
    scaler = SimpleNamespace(cur_scale=1.0)
    made = {"overflow": False, "optimizer": None, "cur_scale": 1.0, "loss_scaler": scaler}
    made |= {deepspeed.FLAT_GROUPS[stage]: [], "_lazy_init_hp_params_optimizer_state": None}
    made |= {"checkpoint_event_epilogue": None, "_hp_optimizer_states_linked": False}
    deepspeed.check_optimizer(SimpleNamespace(**made), stage, fp16=True)
    del made[deepspeed.FLAT_GROUPS[stage] if gone == "flat" else gone]
    with pytest.raises(LaunchError, match=r"deepspeed \d.*tried with: .* has no .*pip install -c constraints.txt"):
        deepspeed.check_optimizer(SimpleNamespace(**made), stage, fp16=True)


@check("torch.cpu_multiplies_bf16")
def bf16_is_multiplied() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    if "avx512f" in flags or "avx2" in flags:
        assert compat_torch.cpu_multiplies_bf16() == ("avx512_bf16" in flags or "amx_tile" in flags)
    assert isinstance(compat_torch.cpu_multiplies_bf16(), bool)


@check("torch.cpu_multiplies_fp16")
def fp16_is_multiplied() -> None:
    if compat_torch.cpu_multiplies_fp16():
        half = torch.full((4, 4), 0.5, dtype=torch.float16)
        assert torch.equal(half @ half, torch.ones(4, 4, dtype=torch.float16))


@check("torch.softmax_backward")
def softmax_has_a_backward() -> None:
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        scores = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
        probabilities, outer = scores.softmax(-1), torch.randn(3, 5, 7, dtype=dtype)
        probabilities.backward(outer)
        found = compat_torch.softmax_backward(outer, probabilities.detach())
        assert found.dtype == dtype
        torch.testing.assert_close(found, scores.grad, rtol=bound, atol=bound)


@check("torch.run_exit_handlers")
def exit_handlers_run() -> None:
    code = "import atexit, os; from trainer.compat.torch import run_exit_handlers as run\n"
    code += "atexit.register(print, 'handled', flush=True); run(); os._exit(3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "handled\n")


@check("torch.dump_collectives")
def the_last_collectives_are_recorded() -> None:
    code = "import os, pickle, torch, torch.distributed as dist; os.environ['TORCH_FR_BUFFER_SIZE'] = '20'\n"
    code += "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
    code += "dist.all_reduce(torch.ones(3)); from trainer.compat.torch import dump_collectives as dump\n"
    code += "print([e['profiling_name'] for e in pickle.loads(dump())['entries']])"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout == "['gloo:all_reduce']\n", done.stderr


@check("torch.uncompile_module")
def a_compiled_module_is_itself_again() -> None:
    layer = nn.Linear(2, 2)
    layer.compile(backend="eager", dynamic=True)
    assert layer._compiled_call_impl is not None
    compat_torch.uncompile_module(layer)
    assert layer._compiled_call_impl is None
    assert layer(torch.ones(1, 2)).shape == (1, 2)


@check("transformers.is_stateful")
def a_state_is_marked(model: Any) -> None:
    assert transformers.is_stateful(tiny("mamba"))
    assert not transformers.is_stateful(model)


@check("transformers.attention_name")
def attention_has_a_name(model: Any) -> None:
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert transformers.attention_name(model) == name
    with pytest.raises(LaunchError, match="has no _attn_implementation"):
        transformers.attention_name(SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace)))


@check("transformers.sdpa")
def sdpa_is_the_models_own(model: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    attention, mask = transformers.sdpa()
    AttentionInterface.register("test_compat", attention)
    AttentionMaskInterface.register("test_compat", mask)
    ids = torch.arange(5, 25).view(2, 10)
    seen = torch.ones_like(ids)
    seen[0, :4] = 0
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=ids, attention_mask=seen).logits
    model.set_attn_implementation("test_compat")
    assert torch.equal(model(input_ids=ids, attention_mask=seen).logits, expected)


@check("transformers.is_loaded_in_8bit")
def eight_bits_are_marked(model: Any, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    keys = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=keys, device_map={"": "cpu"})
    assert transformers.is_loaded_in_8bit(loaded)
    assert not transformers.is_loaded_in_8bit(model)


@check("transformers.byte_of_letter")
def bytes_have_letters(tokenizer: Any) -> None:
    letters = transformers.byte_of_letter()
    assert sorted(letters.values()) == list(range(256))
    text = "a ¿日\n"
    written = "".join(tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids))
    assert bytes(letters[letter] for letter in written).decode() == text


@check("bitsandbytes.keep_4bit_layout", "bitsandbytes.is_4bit")
def four_bits_stay_as_they_are() -> None:
    import bitsandbytes as library

    layer = library.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16)
    layer.to("cpu")
    assert bitsandbytes.is_4bit(layer.weight)
    assert not bitsandbytes.is_4bit(nn.Parameter(torch.zeros(2)))
    model, before = nn.Sequential(layer), layer.weight.clone()
    bitsandbytes.keep_4bit_layout(model)
    with torch.no_grad():
        model.eval()(torch.ones(1, 64, dtype=torch.bfloat16))
    assert torch.equal(layer.weight, before)
    inner = torch.ones(1, 64, dtype=torch.bfloat16, requires_grad=True)
    model.train()(inner).sum().backward()
    assert inner.grad is not None
    assert inner.grad.abs().sum() > 0
    with pytest.raises(LaunchError, match="has no support_avx512bf16_for_cpu"):
        bitsandbytes.keep_4bit_layout(type("Linear4bit", (nn.Linear,), {})(2, 2))


@check("peft.adalora_layers", "peft.adalora_factors", "peft.is_rank_divisor")
def adalora_has_its_layers(model: Any) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    layers = peft.adalora_layers(adapted)
    assert len(layers) == 2
    a, b = peft.adalora_factors(layers[0])
    assert (tuple(a.shape), tuple(b.shape)) == ((3, 64), (64, 3))
    assert len([p for name, p in adapted.named_parameters() if peft.is_rank_divisor(name) and p.numel() == 1]) == 2


@check("peft.is_moved_to_experts")
def names_are_moved_to_experts() -> None:
    with torch.device("meta"):
        mixture, dense = tiny("mixtral"), tiny("llama")
    assert peft.is_moved_to_experts(mixture, "w1")
    assert not peft.is_moved_to_experts(mixture, "q_proj")
    assert not peft.is_moved_to_experts(dense, "gate_proj")


@check("peft.unwrapped")
def wrappers_come_off(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = dict(model.named_modules())
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    under = [found for module in adapted.modules() if (found := peft.unwrapped(module)) is not None]
    assert {id(m) for m in under} == {id(base[n]) for n in base if n == "lm_head" or n.endswith("q_proj")}
    assert peft.unwrapped(base["model.norm"]) is None


@check("peft.trained_token_ids")
def trained_tokens_are_found(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9]})
    )
    assert sorted(number for module in adapted.modules() for number in peft.trained_token_ids(module)) == [5, 9]


@check("peft.forget_wrapper")
def the_base_is_as_it_was(model: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    before = set(vars(model))
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.generate(input_ids=torch.tensor([[5]]), max_new_tokens=1)
    peft.forget_wrapper(model)
    assert set(vars(model)) == before
    model.generate(input_ids=torch.tensor([[5]]), max_new_tokens=1)


@check("peft.is_adapted_parameter", "peft.adapted_parameter_product")
def experts_have_a_product() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny("mixtral"), config)
    layers = [module for module in adapted.modules() if peft.is_adapted_parameter(module)]
    assert len(layers) == 2
    with torch.no_grad():
        weight = layers[0].get_param()
        probe = torch.randn(weight.shape[-1], 3)
        plain, live = weight @ probe, peft.adapted_parameter_product(layers[0], probe)
        layers[0].merge()
        torch.testing.assert_close(layers[0].get_param() @ probe, live)
    assert (live - plain).norm() > 0.1 * plain.norm()


@check("peft.prompt_start", "peft.prompt_parameters")
def prompts_have_their_names() -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    adapted = get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    prompt, words = peft.prompt_start(adapted)
    assert tuple(prompt.weight.shape) == (3, 32)
    assert words.weight is adapted.get_base_model().get_input_embeddings().weight
    for projected, names in (
        (False, {"embedding.weight"}),
        (True, {"embedding.weight", *(f"transform.{k}.{part}" for k in (0, 2) for part in ("weight", "bias"))}),
    ):
        config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=projected, task_type="CAUSAL_LM")
        adapted = get_peft_model(tiny("llama"), config)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert set(peft.prompt_parameters(trained)) == names


@check("typer.use_completion_scripts")
def a_shell_is_given_our_script() -> None:
    from typer._completion_shared import _completion_scripts, get_completion_script

    before = dict(_completion_scripts)
    try:
        typer.use_completion_scripts({"bash": "complete -F %(complete_func)s %(prog_name)s"})
        script = get_completion_script(prog_name="afina", complete_var="_AFINA_COMPLETE", shell="bash")
    finally:
        _completion_scripts.update(before)
    assert script == "complete -F _afina_completion afina"


@check("hydra.overrides_parser")
def overrides_are_parsed() -> None:
    override = hydra.overrides_parser().parse_override("method.r=8,16")
    assert (override.key_or_group, override.is_sweep_override(), override.package) == ("method.r", True, None)
    assert list(override.sweep_string_iterator()) == ["8", "16"]


@check("hydra.forget_initialization")
def hydra_starts_again(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "one.yaml").write_text("a: 1\n")
    hydra.forget_initialization()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        with pytest.raises(ValueError, match="already initialized"):
            initialize_config_dir(str(tmp_path), version_base="1.3")
        hydra.forget_initialization()
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            assert compose("one") == {"a": 1}


@check("wandb.without_metadata")
def metadata_is_a_setting() -> None:
    settings = importlib.import_module("wandb").Settings
    for hidden in (True, False):
        assert settings(**wandb.without_metadata(hidden)).x_disable_meta is hidden
    with pytest.raises(ValueError, match="x_disable_metas"):  # a name that it does not have is no silent one
        settings(x_disable_metas=True)


@check("wandb.parse_record")
def records_have_a_history() -> None:
    written = importlib.import_module("wandb.proto.wandb_internal_pb2").Record()
    written.history.step.num = 7
    written.history.item.add(nested_key=["loss"], value_json="0.5")
    record = wandb.parse_record(written.SerializeToString())
    assert (record.HasField("history"), record.history.HasField("step"), record.history.step.num) == (True, True, 7)
    (item,) = record.history.item
    assert (item.key, list(item.nested_key), item.value_json) == ("", ["loss"], "0.5")


@check("datasets.table_fingerprint")
def tables_have_a_fingerprint(tmp_path: Path) -> None:
    library = importlib.import_module("datasets")
    first, same, other = (library.Dataset.from_dict({"a": values}) for values in ([1, 2], [1, 2], [1, 3]))
    assert datasets.table_fingerprint(first) == datasets.table_fingerprint(same) != datasets.table_fingerprint(other)


@check("hub.go_offline")
def libraries_go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    constants, config = (importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    assert not constants.is_offline_mode()
    hub.go_offline()
    assert importlib.import_module("transformers.utils.hub").is_offline_mode()
    with pytest.raises(importlib.import_module("huggingface_hub.errors").OfflineModeIsEnabled):
        importlib.import_module("huggingface_hub").HfApi().model_info("org/name")
    assert config.HF_HUB_OFFLINE


@check("hub.quiet_retries")
def retries_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library, told = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    for each in (library, hub.logger):  # whatever tests before have made of their parents
        monkeypatch.setattr(each, "handlers", [handler])
        monkeypatch.setattr(each, "filters", [])
        monkeypatch.setattr(each, "level", logging.WARNING)
        each.manager._clear_cache()  # type: ignore[attr-defined]
    hub.quiet_retries()
    hub.quiet_retries()
    assert len(library.filters) == 1
    source = Path(importlib.import_module("huggingface_hub.utils._http").__file__ or "").read_text()
    assert source.count(" thrown while requesting {method} {url}") == 2
    assert source.count("[Retry {nb_tries}/{max_retries}]") == 2
    for text in ("'x' thrown while requesting HEAD y", "Retrying in 1s [Retry 1/5]."):
        library.warning(text)
    library.warning("something else")
    assert told == ["the hub does not answer ('x'); trying again for half a minute", "something else"]
