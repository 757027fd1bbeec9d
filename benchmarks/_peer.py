"""One measured run of a peer, in a process of its own: TRL's SFTTrainer, or the plain Trainer padding to one length.

python benchmarks/_peer.py {trl,trainer} ROWS.npz SETTINGS.json RESULT.json

Both get token ids and loss masks as afina prepared them, in the order in which afina draws them; so nothing but the
training differs. The window is the one that afina is measured with: from the loaded base model to the saved adapter.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main(kind: str, rows_file: Path, settings_file: Path, result_file: Path) -> None:
    """Train once and write seconds, tokens, losses and the peak of the resident memory."""
    settings = json.loads(settings_file.read_text())
    rows = load_rows(rows_file)[: settings["steps"] * settings["global_size"]]
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config.use_cache = False
    build = trl_trainer if kind == "trl" else plain_trainer
    begin = time.perf_counter()
    trainer = build(model, tokenizer, rows, settings)
    trainer.train()
    trainer.save_model(settings["output"])
    seconds = time.perf_counter() - begin
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result_file.write_text(
        json.dumps(
            {
                "seconds": seconds,
                "useful_tokens": sum(len(ids) for ids, _ in rows),
                "losses": losses,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def load_rows(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and loss mask of each row, in the order of training."""
    arrays = np.load(path)
    ends = np.cumsum(arrays["lengths"])[:-1]
    return list(zip(np.split(arrays["ids"], ends), np.split(arrays["loss_mask"], ends), strict=True))


def with_adapters(model: Any, settings: dict[str, Any]) -> Any:
    """Attach the adapters that all three train; both peers from the seed that afina takes."""
    from peft import LoraConfig, get_peft_model

    targets = settings["targets"]
    torch.manual_seed(0)
    return get_peft_model(
        model,
        LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], target_modules=targets, task_type="CAUSAL_LM"),
    )


def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that both trainers have alike."""
    return {
        "output_dir": settings["output"],
        "per_device_train_batch_size": settings["micro_size"],
        "gradient_accumulation_steps": settings["global_size"] // settings["micro_size"],
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": settings["schedule"],
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": settings["autocast"],
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def trl_trainer(model: Any, tokenizer: Any, rows: list[Any], settings: dict[str, Any]) -> Any:
    """Build TRL's trainer, which pads to the longest row of each forward and scores labels only."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict(
        {
            "input_ids": [ids.tolist() for ids, _ in rows],
            "labels": [np.where(mask, ids, -100).tolist() for ids, mask in rows],
        }
    )
    config = SFTConfig(**arguments(settings), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    adapted = with_adapters(model, settings)
    return SFTTrainer(model=adapted, args=config, train_dataset=data, processing_class=tokenizer)


def plain_trainer(model: Any, tokenizer: Any, rows: list[Any], settings: dict[str, Any]) -> Any:
    """Build what tutorials do: every row padded to the longest of the data, the loss by the model."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    width = max(len(ids) for ids, _ in rows)

    def fill(values: np.ndarray, filler: int) -> list[int]:
        return np.pad(values, (0, width - len(values)), constant_values=filler).tolist()

    data = Dataset.from_dict(
        {
            "input_ids": [fill(ids, tokenizer.pad_token_id) for ids, _ in rows],
            "attention_mask": [fill(np.ones_like(ids), 0) for ids, _ in rows],
            "labels": [fill(np.where(mask, ids, -100), -100) for ids, mask in rows],
        }
    )
    return Trainer(
        model=with_adapters(model, settings),
        args=TrainingArguments(**arguments(settings)),
        train_dataset=data,
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main(sys.argv[1], *(Path(name) for name in sys.argv[2:]))
