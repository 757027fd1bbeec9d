"""What only a GPU can show: NCCL, fused AdamW, device memory, the fp16 loss scaler. Skipped, and unrun, without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.processes import torchrun
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
    assert all(0 < r["peak_memory_bytes"] < 2**31 for r in read_metrics(tmp_path / "runs" / "gpu")[1:])


def test_fp16_scales_its_loss(tiny_model: Path, tmp_path: Path) -> None:
    overrides = ["debug=tiny", "zero=stage2", "model.dtype=fp16", "run.name=fp16"]
    torchrun("trainer.train", *overrides, nproc=1, cwd=tmp_path)
    assert all(r["loss_scale"] >= 1 for r in read_metrics(tmp_path / "runs" / "fp16")[1:])
