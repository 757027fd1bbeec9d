"""Make models of random weights in bf16, of well-known shapes, where the GPU is: nothing is carried or downloaded.

python -m benchmarks.gpu.make_models TOKENIZER FOLDER SHAPE…
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

MADE = "MADE"  # written last: a folder without it was cut off
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {**LLAMA_8B, "num_hidden_layers": 32},
    "8b8": {**LLAMA_8B, "num_hidden_layers": 8},  # 8 of the 32 layers: 2.8e9 weights
    "1b": {
        **LLAMA_8B,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**ROPE, "factor": 32.0},
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "dry": {
        "vocab_size": 50000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write each model into a folder of its name, with the tokenizer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path, help="a folder whose files go with each model")
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE", help=" ".join(SHAPES))
    asked = parser.parse_args(arguments)
    for name in asked.shapes:
        if (asked.folder / name / MADE).is_file():
            print(f"{name}: there already", flush=True)
            continue
        begin = time.perf_counter()
        parameters = make(SHAPES[name], asked.folder / name)
        for file in asked.tokenizer.iterdir():
            if file.name != "generation_config.json":
                shutil.copy(file, asked.folder / name)
        (asked.folder / name / MADE).touch()
        print(f"{name}: {parameters:,} parameters, {time.perf_counter() - begin:.1f} s", flush=True)


def make(shape: dict[str, Any], folder: Path) -> int:
    """Save a model of this shape; returns its number of parameters."""
    config = LlamaConfig(**shape, dtype="bfloat16", bos_token_id=1, eos_token_id=2, pad_token_id=2)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
