"""The GPU campaign holds on to the code: its modules reach into afina's rooms by name, and no GPU is there to find out.

Each module is imported, each patch applied and compared with what it replaces, and one training goes the whole way
through ``campaign.sh`` with tiny shapes.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.processes import ROOT, run

KIT = ROOT / "benchmarks" / "gpu"
MODULES = sorted(f"benchmarks.gpu.{path.stem}" for path in KIT.glob("*.py") if path.stem != "__init__")
# Scripts of benchmarks/ that measure by afina's own functions.
OTHERS = (
    "_afina",
    "_peer",
    "_rows",
    "_score",
    "merge_memory",
    "preparation",
    "quality",
    "throughput",
)


def kit(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_and_knows_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "main"):
        with pytest.raises(SystemExit) as exit_:
            module.main(["--help"])
        assert exit_.value.code == 0
        assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_benchmarks_import(name: str) -> None:
    importlib.import_module(f"benchmarks.{name}")


def test_what_the_other_benchmarks_patch_is_there() -> None:
    import trainer.merge.merge
    import trainer.training.build
    from benchmarks import _merge, _start

    assert all(callable(getattr(module, name)) for module, name, _ in _start.PARTS)
    assert all(callable(getattr(trainer.merge.merge, name)) for name in _merge.PARTS)
    assert callable(trainer.training.build.load_model)
    assert callable(_start.Loop.step)


def test_every_variant_applies_and_is_undone() -> None:
    variants = kit("variants")
    patched = (
        (importlib.import_module("trainer.kernels.trie_attention"), ("trie_attention", "_attend_bucket")),
        (importlib.import_module("trainer.kernels.rms_norm"), ("_forward",)),
        (importlib.import_module("trainer.kernels.label_loss"), ("CHUNK_ELEMENTS",)),
        (importlib.import_module("trainer.data.batching.micro_batch"), ("build_paths",)),
    )

    def state() -> list[Any]:
        return [getattr(module, name) for module, names in patched for name in names]

    before = state()
    with variants.applied(",".join(variants.VARIANTS)):
        assert all(one is not other for one, other in zip(state(), before, strict=True))
        assert torch.are_deterministic_algorithms_enabled()
    assert state() == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_campaign_names_only_variants_that_exist() -> None:
    names = set(kit("variants").VARIANTS)
    text = (KIT / "campaign.sh").read_text()
    for line in text.splitlines():
        if line.startswith(("FIXES=", "BEST=")):
            assert set(line.split("=")[1].split(",")) <= names
    assert set(kit("correctness").FIXES.split(",")) <= names


@pytest.mark.parametrize("case", ["unshared, 256 to 768", "shared 1024 + 56 x 128"])
@pytest.mark.parametrize("variant", ["packgqa", "varlen"])
def test_an_attention_variant_gives_the_gradients_of_the_kernel(
    variant: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trainer.kernels.trie_attention as kernel

    attention, variants = kit("micro_attention"), kit("variants")
    # rows with few keys never reach SDPA on a CPU, where `packgqa` has its place
    monkeypatch.setattr(kernel, "is_short", lambda *_: False)
    expected = gradients(attention.make_batch(*attention.CASES[case]))
    with variants.applied(variant):
        found = gradients(attention.make_batch(*attention.CASES[case]))
    assert largest_distance(found, expected) < 1e-5


def gradients(batch: Any) -> Sequence[Tensor]:
    import trainer.kernels.trie_attention as kernel

    attention, measure = kit("micro_attention"), kit("measure")
    with kernel.trie_context(batch.paths):
        return measure.forward_backward(attention.attend, attention.make_qkv(batch.input_ids.numel(), 8, 2, 16))()


def largest_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    distance = kit("measure").relative_distance
    return max(distance(one, other) for one, other in zip(found, expected, strict=True))


def test_the_small_questions_have_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """The sections that reach into the kernels; what they print holds no error."""
    assert kit("micro").main(["norms", "loss", "sync"]) == 0
    kit("micro_attention").measure_attention("unshared 16 x 512", "varlen", None)
    lines = [json.loads(line[7:]) for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 8
    assert [line for line in lines if "error" in line] == []


def test_subtree_ends() -> None:
    #   0 ── 1 ── 2, 3 under 1, 4 under 0, then a second root with a child
    assert kit("micro_attention").subtree_ends([0, 1, 2, 2, 1, 0, 1]) == [5, 4, 3, 4, 5, 7, 7]


def test_lora_and_rms_norm_variants_give_what_they_replace(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    from trainer.kernels.rms_norm import patch_rms_norms

    def loss_gradients(names: str) -> list[Tensor]:
        with kit("variants").applied(names):
            import copy

            base = copy.deepcopy(model)
            patch_rms_norms(base)
            torch.manual_seed(0)
            adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules="all-linear"))
            trainable = [p for p in adapted.parameters() if p.requires_grad]
            with torch.no_grad():
                for parameter in trainable:
                    parameter.normal_(std=0.02)
            output = adapted(input_ids=torch.arange(3, 43)[None]).logits
            return list(torch.autograd.grad(output.square().mean(), trainable))

    assert largest_distance(loss_gradients("rms,lora"), loss_gradients("")) < 1e-5


def test_the_report_shows_results_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect, report = kit("collect"), kit("report")
    results, log, result = (tmp_path / name for name in ("results.jsonl", "log", "result.json"))
    log.write_text('RESULT {"stage": "env", "what": "gpu", "gpu": "NVIDIA H100 80GB"}\n')
    collect.main([str(results), "env", "0", "3", str(log), str(result)])
    result.write_text(json.dumps({"median_step_seconds": 2.0, "useful_tokens_per_second": 9.0, "tflops": 494.5}))
    collect.main([str(results), "8b8_trie", "0", "3", str(log), str(result)])
    assert report.main([str(results)]) == 0
    assert "| 8b8_trie | 2.000 | 9 |  | 494 | 50.0% |" in capsys.readouterr().out
    log.write_text("Traceback\nRuntimeError: out of memory\n")
    collect.main([str(results), "8b", "1", "3", str(log), str(tmp_path / "none")])
    assert report.main([str(results)]) == 1
    assert "- 8b: **failed** (1): `Traceback | RuntimeError: out of memory`" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["campaign.sh", "prepare.sh"])
def test_a_script_parses_and_wants_the_root(name: str, tmp_path: Path) -> None:
    run(["bash", "-n", KIT / name], cwd=tmp_path)
    assert run(["bash", KIT / name], cwd=tmp_path, check=False).returncode == 2


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a card: this would measure it")
def test_make_gpu_without_a_card_is_one_line() -> None:
    answer = subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode != 0
    assert "needs an NVIDIA card" in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr


@pytest.mark.slow
def test_a_dry_campaign_ends_in_0(tiny_model: Path, tmp_path: Path) -> None:
    settings = {
        "DRY": "1",
        "ONLY": "speed",
        "KIT_RUNS": "8b8_trie_best 8b8_trl_padded",
        "KIT_STEPS": "3",
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "KIT_TOKENIZER": str(tiny_model),
        **{f"KIT_{name}": str(tmp_path / name.lower()) for name in ("WORK", "MODELS", "SITE")},
    }
    finished = run(["bash", KIT / "campaign.sh"], cwd=ROOT, env=settings, timeout_seconds=600)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    (trained,) = (line for line in lines if line["stage"] == "8b8_trie_best")
    assert len(trained["losses"]) == 2, finished.tail()  # the third step is profiled
    assert "aten::" in (tmp_path / "out" / "profile.txt").read_text()
    assert trained["variants"] == "nocudnn,varlen,rms,lora,chunk"
    assert "| 8b8_trie_best |" in (tmp_path / "out" / "report.md").read_text()
