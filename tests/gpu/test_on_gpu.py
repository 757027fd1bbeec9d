"""What only a GPU can show: NCCL, fused AdamW, device memory, the fp16 loss scaler. Skipped, and unrun, without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.processes import torchrun
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
