"""Report what this installation can run: the matrix of methods, base precisions and ZeRO stages; this machine."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from trainer.config.rules.matrix import BITS, REFUSALS, VARIANTS, ZERO, cells, refusal

WORKS = "works"


def build_matrix() -> tuple[list[str], list[list[str]], list[str]]:
    """Build the matrix: heads, rows (method, bits, then a stage each), and notes.

    A cell is ``works`` or ``refused N``, N being a note. What depends on gradient checkpointing or packing alone is in
    the notes too.
    """
    every = cells()
    used = [each for each in REFUSALS if any(refusal(cell) is each for cell in every.values())]
    rows = []
    for variant in VARIANTS:
        for bits in BITS:
            found = [refusal(every[variant, bits, zero]) for zero in ZERO]
            rows.append([variant, str(bits), *(WORKS if f is None else f"refused {used.index(f) + 1}" for f in found)])
    notes = [f"{number}. {each.key}: {each.seen} → {each.hint}" for number, each in enumerate(used, start=1)]
    notes += [f"*  {each.key}: {each.seen} → {each.hint}" for each in REFUSALS if each not in used]
    return ["method", "bits", *ZERO], rows, notes


def count_cells(rows: list[list[str]]) -> tuple[int, int]:
    """Count the cells that work, and those that are refused."""
    flat = [cell for row in rows for cell in row[2:]]
    return flat.count(WORKS), len(flat) - flat.count(WORKS)


def describe_machine() -> list[list[str]]:
    """Describe this machine as training would find it, a fact a row."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
    listed = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    memory = psutil.virtual_memory()
    return [
        ["CPU cores", str(os.cpu_count())],
        ["host memory", f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} GiB free"],
        ["GPUs", listed or "none: training runs on the CPU"],
        ["bf16 on the GPU", "yes" if gpus and torch.cuda.is_bf16_supported(including_emulation=False) else "no"],
        ["quantised bases", "yes" if find_spec("bitsandbytes") else "no: bitsandbytes is not installed"],
        ["flash attention", "yes" if find_spec("flash_attn") else "no: sdpa is used"],
        ["Slurm", shutil.which("sbatch") or "no: sbatch is not on PATH"],
        ["free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"],
    ]
