"""Memory of a merge beside the size of the model: `afina merge` of a LoRA adapter on all linear layers.

python benchmarks/merge_memory.py [--layers 22]

The base is a random Llama in bf16 (2048 wide, 22 layers: 2.5 GB), the adapter has r=16 and random values. The peak is
the process's resident memory, mapped files counted, less what importing the libraries takes. Writes merge_memory.md and
merge_memory.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from trainer.config import load
from trainer.models.embedded import fetch
from trainer.tracking.logs import configure_logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22, help="102 MB each, 0.4 GB beside them")
    layers = parser.parse_args().layers
    configure_logging()
    with tempfile.TemporaryDirectory() as name:
        model_bytes = make_run(Path(name), layers, width=2048)
        found = {"model_bytes": model_bytes, **measure(Path(name))}
    text = table(found)
    print(text)
    (HERE / "merge_memory.md").write_text(text)
    (HERE / "merge_memory.json").write_text(json.dumps(found, indent=1) + "\n")


def make_run(folder: Path, layers: int, width: int) -> int:
    """A base model, and the folder of a run that has trained an adapter of it; the base's bytes."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(fetch("smollm2_135m"))
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": max(1, width // 256)}
    sizes = {"hidden_size": width, "intermediate_size": 11 * width // 4, "num_hidden_layers": layers, **heads}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    tokenizer.save_pretrained(folder / "base")
    model_bytes = sum(p.nbytes for p in model.parameters())
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    run = folder / "run"
    adapted.save_pretrained(run / "adapter")
    tokenizer.save_pretrained(run / "adapter")
    overrides = [f"model.name_or_path={folder / 'base'}", "model.dtype=bf16", "method.r=16"]
    data = [f"data.path={HERE / 'data' / 'soc_codes.jsonl'}", "data.max_rows=64"]
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(load([*overrides, *data]))))
    (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 0, "metrics": {}}))
    return model_bytes


def measure(folder: Path) -> dict[str, Any]:
    """One merge in a process of its own."""
    result = folder / "result.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "_merge.py", result, folder / "run", folder / "merged"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return dict(json.loads(result.read_text()))


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    size, imports = found["model_bytes"], found["imports_bytes"]
    peak = found["peak_bytes"] - imports
    lines = [
        f"`afina merge`: LoRA r=16 on all linear layers of a random Llama of {size / 1e9:.2f} GB in bf16; "
        f"{os.cpu_count()} cores, {found['seconds']:.0f} s.",
        f"Peak: {peak / 1e9:.2f} GB, **{peak / size:.2f} ×** the model, beside {imports / 1e9:.2f} GB that importing "
        "the libraries takes.",
        "",
        "| part | most resident memory, over the model's size | of this process's own | mapped from files |",
        "|---|---|---|---|",
    ]
    for part, peaks in found["parts"].items():
        both, own, file = (peaks[name] for name in ("both", "own", "file"))
        lines.append(f"| {part} | {(both - imports) / size:.2f} × | {own / 1e9:.2f} GB | {file / 1e9:.2f} GB |")
    lines += ["", "Pages mapped from files are counted in the peak; the system takes them back when it needs them."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
