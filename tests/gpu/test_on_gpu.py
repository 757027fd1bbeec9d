"""What only a GPU can show: NCCL, fused AdamW, 8 bits and pages, device memory, the fp16 loss scaler. Skipped, and
unrun, without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import torchrun
from trainer.config.rules.optimizers import optimizer_cells, optimizer_refusal
from trainer.data.batching.micro_batch import Tokens, collate_padded, collate_trie
from trainer.tracking.files import read_metrics, read_summary

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("zero", ["stage0", "stage2", "stage3", "stage2_offload"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_on_every_gpu_finishes(tiny_model: Path, tmp_path: Path, zero: str, dtype: str) -> None:
    overrides = ["debug=tiny", f"zero={zero}", f"model.dtype={dtype}", "run.name=gpu", "optim.learning_rate=1e-2"]
    torchrun("trainer.train", *overrides, nproc=torch.cuda.device_count(), cwd=tmp_path)
    summary = read_summary(tmp_path / "runs" / "gpu")
    assert summary is not None
    assert summary["status"] == "finished"
    assert summary["metrics"]["eval_loss"] < summary["metrics"]["eval_loss_before"]
    for record in read_metrics(tmp_path / "runs" / "gpu")[1:]:
        assert 0 < record["peak_memory_bytes"] <= record["reserved_memory_bytes"] < 2**31
        assert 0 < record["model_flops_utilization"] < 1


@pytest.mark.parametrize(
    ("name", "zero"),
    [(n, z) for (n, z), cell in optimizer_cells().items() if n != "adamw" and optimizer_refusal(cell) is None],
)
def test_every_optimizer_trains_and_resumes_to_the_bit(tiny_model: Path, tmp_path: Path, name: str, zero: str) -> None:
    """All weights, so that there are tensors large enough for 8 bits and for pages."""
    rate = "1e-3" if name == "lion" else "1e-2"
    common = ["debug=tiny", "method=full", "rank=null", f"zero={zero}", f"optim.name={name}", "model.dtype=fp32"]
    common += [f"optim.learning_rate={rate}", "batch.max_steps=6", "run.deterministic=true"]
    for run, lives in {"straight": [[]], "resumed": [["run.stop_at_step=3"], []]}.items():
        for more in lives:
            torchrun("trainer.train", *common, f"run.name={run}", *more, nproc=1, cwd=tmp_path, check=not more)
    found = [load_file(tmp_path / "runs" / run / "model" / "model.safetensors") for run in ("straight", "resumed")]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    summary = read_summary(tmp_path / "runs" / "straight")
    assert summary is not None
    assert summary["metrics"]["eval_loss"] < summary["metrics"]["eval_loss_before"]


@pytest.mark.parametrize("as_trie", [True, False])
def test_a_micro_batch_comes_over_whole(as_trie: bool) -> None:
    """From page-locked memory, not waited for, with other work on the device before it."""
    rows = [Tokens(np.arange(n, dtype=np.int32), np.arange(n) > 1) for n in (3, 500, 70)]
    batch = collate_trie(rows, range(3)) if as_trie else collate_padded(rows, range(3), 0)
    device, pinned = torch.device("cuda", torch.cuda.current_device()), batch.pin_memory()
    assert all(t.is_pinned() for t in pinned.tensors())
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(10):
        busy = busy @ busy.T / 4096
    for source in (batch, pinned):
        moved = source.to(device)
        assert {t.device for t in moved.tensors()} == {device}
        assert all(torch.equal(a, b.cpu()) for a, b in zip(batch.tensors(), moved.tensors(), strict=True))


def test_fp16_scales_its_loss(tiny_model: Path, tmp_path: Path) -> None:
    overrides = ["debug=tiny", "zero=stage2", "model.dtype=fp16", "run.name=fp16"]
    torchrun("trainer.train", *overrides, nproc=1, cwd=tmp_path)
    assert all(r["loss_scale"] >= 1 for r in read_metrics(tmp_path / "runs" / "fp16")[1:])
