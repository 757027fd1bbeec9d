"""The GPU campaign holds on to the code: its modules reach into afina's rooms by name, and no GPU is there to find out.

Each script knows its arguments, what the small questions time is compared with what it stands beside, and one training
goes the whole way through ``campaign.sh`` with tiny shapes.
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
from trainer.config import load, run_folder

KIT = ROOT / "benchmarks" / "gpu"
MODULES = sorted(f"benchmarks.gpu.{path.stem}" for path in KIT.glob("*.py") if path.stem != "__init__")
# Scripts of benchmarks/ that measure by afina's own functions.
OTHERS = (
    "_afina",
    "_peer",
    "_rows",
    "_score",
    "merge_memory",
    "methods",
    "preparation",
    "quality",
    "sweep",
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


@pytest.mark.parametrize("case", ["unshared, 256 to 768", "shared 1024 + 56 x 128"])
def test_the_kinds_of_attention_agree(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those over one layout have one gradient; the settings are those of a run again afterwards."""
    import trainer.kernels.trie_attention as kernel

    attention = kit("micro_attention")
    # rows with few keys never reach SDPA on a CPU, where packed query heads have their place
    monkeypatch.setattr(kernel, "is_short", lambda *_: False)
    before = kernel.packs_query_heads, torch.backends.cuda.cudnn_sdp_enabled()
    found: dict[bool, list[Sequence[Tensor]]] = {False: [], True: []}
    for kind in attention.KINDS.values():
        if not kind.is_flex:
            found[kind.padded].append(gradients(case, kind))
    assert [len(of_layout) for of_layout in found.values()] == [4, 3]
    for first, *others in found.values():
        assert all(largest_distance(other, first) < 1e-5 for other in others)
    assert (kernel.packs_query_heads, torch.backends.cuda.cudnn_sdp_enabled()) == before


def gradients(case: str, kind: Any) -> Sequence[Tensor]:
    attention, measure = kit("micro_attention"), kit("measure")
    batch = attention.make_batch(case, kind)
    with attention.settings_of(kind, batch):
        inputs = attention.make_qkv(batch, heads=(8, 2), width=16)
        gradients: Sequence[Tensor] = measure.forward_backward(attention.attend(batch, kind), inputs)()
        return gradients


def largest_distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    distance = kit("measure").relative_distance
    return max(distance(one, other) for one, other in zip(found, expected, strict=True))


def test_the_small_questions_have_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """What is no attention: nothing that is printed holds an error, and no kernel is far from what it stands beside."""
    assert kit("micro").main(["determinism", "norms", "lora", "swiglu", "rope", "loss", "sync"]) == 0
    lines = [json.loads(line[7:]) for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT ")]
    assert [line for line in lines if "error" in line] == []
    assert [line.get("same_to_the_bit") for line in lines if line.get("deterministic")] == [[True] * 3] * 2
    distances = [line[name] for line in lines for name in ("far", "far_from_peft") if name in line]
    assert len(distances) == 7
    assert max(distances) < 1e-5
    assert sum("chunk_elements" in line for line in lines) == 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_case_that_must_be_the_same_to_the_bit_is_found_out(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    correctness = kit("correctness")
    case, done = correctness.cases()["deterministic_b"], {}
    for name, value in (("deterministic_a", 1.0), ("deterministic_b", 1.0 + 1e-6)):
        adapter = tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors"
        adapter.parent.mkdir(parents=True)
        save_file({"weight": torch.full((2,), value)}, adapter)
        done[name] = correctness.Finished(0, 1.0, "kernels: none but PyTorch's own\n")
    found = correctness.describe(tmp_path, "deterministic_b", case, done)
    assert found["broken"] == "the same bits are promised"
    assert found["kernels"] == "none"
    loose = correctness.Case((), against="deterministic_a")
    assert "broken" not in correctness.describe(tmp_path, "deterministic_b", loose, done)


def test_subtree_ends() -> None:
    #   0 ── 1 ── 2, 3 under 1, 4 under 0, then a second root with a child
    assert kit("micro_attention").subtree_ends([0, 1, 2, 2, 1, 0, 1]) == [5, 4, 3, 4, 5, 7, 7]


def test_a_log_says_which_kernels_are_in_use() -> None:
    choices = kit("collect").choices_in
    left_out = "kernels: rope left out on 4 rows: RuntimeError: no compiler"
    found = choices(
        ["packing: trie, verified", left_out, "kernels: varlen, lora, verified against eager attention (…)"]
    )
    assert found["kernels"] == "varlen, lora"
    assert found["kernels_left_out"] == left_out.removeprefix("kernels: ")
    assert choices(["kernels: none but PyTorch's own"]) == {"kernels": "none"}
    assert choices(["loss 1.0"]) == {}


def test_the_utilization_is_that_of_the_time_between_synchronisations() -> None:
    steps = [{"mfu": 0.4, "step_seconds": 1.0, "seconds": 2.0}, {"mfu": 0.2, "step_seconds": 2.0, "seconds": 2.0}]
    assert kit("train_timed").utilization(steps, "mfu") == pytest.approx(0.2)


def test_the_report_shows_results_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect, report = kit("collect"), kit("report")
    results, log, result = (tmp_path / name for name in ("results.jsonl", "log", "result.json"))
    log.write_text('RESULT {"stage": "env", "what": "gpu", "gpu": "NVIDIA H100 80GB"}\n')
    collect.main([str(results), "env", "0", "3", str(log), str(result)])
    used = {"model_flops_utilization": 0.5, "useful_flops_utilization": 0.446}
    result.write_text(json.dumps({"median_step_seconds": 2.0, "useful_tokens_per_second": 6236.5, **used}))
    log.write_text("kernels: varlen, lora, verified against eager attention without them\n")
    collect.main([str(results), "8b_trie", "0", "3", str(log), str(result)])
    assert report.main([str(results)]) == 0
    text = capsys.readouterr().out
    assert "| 8b_trie | 2.000 | 6236 |  | 50.0% | 44.6% |  |  | varlen, lora |" in text
    assert "-50.0% beside the 12473 of NeMo Automodel" in text
    assert "+4.0 points beside its 40.6%" in text
    log.write_text("Traceback\nRuntimeError: out of memory\n")
    collect.main([str(results), "8b", "1", "3", str(log), str(tmp_path / "none")])
    assert report.main([str(results)]) == 1
    assert "- 8b: **failed** (1): `Traceback | RuntimeError: out of memory`" in capsys.readouterr().out


def test_the_report_puts_a_fused_group_beside_its_trials_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    found = {"8b8_sweep_256": 0.5, "8b8_sweep_256_lone": 0.25, "8b8_sweep_2048": 2.0}
    rows = [{"stage": stage, "code": 0, "trials": 8, "median_step_seconds": s} for stage, s in found.items()]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert kit("report").main([str(results)]) == 0
    text = capsys.readouterr().out
    assert "- 8b8_sweep_256: a step of 8 trials on one base takes 0.500 s, 8 lone steps take 2.000 s: 4.00 ×" in text
    assert "- 8b8_sweep_2048:" not in text


def test_a_group_for_the_kit_is_what_a_sweep_would_write(tmp_path: Path) -> None:
    together = kit("train_together")
    trials = together.trials_of(["debug=tiny", "optim.learning_rate=1e-3", f"run.dir={tmp_path}", "run.name=s"], 3)
    configs = [load(trial) for trial in trials]
    assert [config.optim.learning_rate for config in configs] == pytest.approx([1e-3, 1.25e-3, 1.5625e-3])
    assert [run_folder(config) for config in configs] == [tmp_path / "s" / f"trial{k}" for k in range(3)]
    file = together.write_group(trials)
    assert file.parents[2] == tmp_path / "s"
    assert json.loads(file.read_text()) == {"config": None, "trials": trials, "halving": None}


def test_a_groups_step_counts_once(tmp_path: Path) -> None:
    seconds = {"a": [9.0, 9.0, 1.0, 2.0, 3.0], "b": [9.0, 9.0, 1.5, 1.0, 3.0]}
    for name, found in seconds.items():
        (tmp_path / name).mkdir()
        lines = [{"step": n, "step_seconds": s, "useful_tokens": 13, "loss": 1.0} for n, s in enumerate(found, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    together = kit("train_together").summary([tmp_path / "a", tmp_path / "b"])
    assert together["trials"] == 2
    assert together["median_step_seconds"] == 2.0
    assert together["useful_tokens_per_second"] == pytest.approx(3 * 2 * 13 / 6.5)
    lone = kit("train_together").summary([tmp_path / "a"])
    assert lone["useful_tokens_per_second"] == pytest.approx(3 * 13 / 6.0)


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
        "KIT_RUNS": "8b8_trie 8b8_trl_padded",
        "KIT_STEPS": "3",
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "KIT_TOKENIZER": str(tiny_model),
        **{f"KIT_{name}": str(tmp_path / name.lower()) for name in ("WORK", "MODELS", "SITE")},
    }
    finished = run(["bash", KIT / "campaign.sh"], cwd=ROOT, env=settings, timeout_seconds=600)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    (trained,) = (line for line in lines if line["stage"] == "8b8_trie")
    assert len(trained["losses"]) == 2, finished.tail()  # the third step is profiled
    assert "aten::" in (tmp_path / "out" / "profile.txt").read_text()
    assert trained["kernels"] == "varlen, lora, rms_norm"
    assert 0 < trained["model_flops_utilization"] < 1
    assert "| 8b8_trie |" in (tmp_path / "out" / "report.md").read_text()
