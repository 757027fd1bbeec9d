"""Batches of ever other sizes do not make a process on CPU grow: torch keeps code for a few shapes only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# 1,000 products in bf16, each of a shape of its own; prints how much more the C library has handed out after them.
CODE = """
import ctypes
import trainer
import torch

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h mapped us fs used free k".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
weight = torch.ones(64, 64, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.ones(8, 64, dtype=torch.bfloat16), weight)
before = library.mallinfo2().used
for rows in range(100, 1100):
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
print(library.mallinfo2().used - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's mallinfo2")
def test_a_thousand_shapes_are_not_kept() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 2**20, "535 MiB with torch's own limits, on a CPU with products in bf16"
