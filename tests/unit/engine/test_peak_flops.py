"""Peaks by the names that CUDA gives to cards, and a peak that is measured."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.engine.peak_flops import peak_flops, published_peak

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", BF16, 989.4),
        ("NVIDIA H100 80GB HBM3", FP32, 67),
        ("NVIDIA H100 PCIe", BF16, 756),
        ("NVIDIA H100 NVL", FP16, 835.5),
        ("NVIDIA H200", BF16, 989.4),
        ("NVIDIA A100-SXM4-80GB", BF16, 312),
        ("NVIDIA A100-PCIE-40GB", FP32, 19.5),
        ("NVIDIA A10", BF16, 125),
        ("NVIDIA A10G", BF16, 70),
        ("NVIDIA L4", BF16, 121),
        ("NVIDIA L40S", BF16, 362),
        ("NVIDIA GeForce RTX 4090", BF16, 165.2),
        ("NVIDIA RTX A6000", BF16, 154.8),
        ("NVIDIA RTX 6000 Ada Generation", BF16, 364.2),
        ("Tesla V100-SXM2-16GB", FP16, 125),
        ("Tesla T4", FP16, 65),
        # no tensor cores for it, or another card than the name begins with
        ("Tesla T4", BF16, None),
        ("Quadro RTX 6000", BF16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", BF16, None),
        ("NVIDIA GeForce RTX 3090 Ti", BF16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", BF16, None),
        ("AMD Instinct MI300X", BF16, None),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, tera: float | None) -> None:
    assert published_peak(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_cpu_is_measured_and_is_not_beaten_by_a_plain_product() -> None:
    peak = peak_flops(torch.device("cpu"), FP32)
    assert "measured" in peak.source
    x = torch.ones(1024, 256)
    begin = time.perf_counter()
    for _ in range(5):
        x @ x.T
    assert 5 * 2 * 1024 * 1024 * 256 / (time.perf_counter() - begin) < 1.5 * peak.per_second
