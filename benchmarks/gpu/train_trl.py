"""Train with TRL's SFTTrainer on the rows that afina would draw, in the same order.

python -m benchmarks.gpu.train_trl [--padding-free] [--liger] [--attention sdpa] RESULT.json [afina's overrides]

Model, rows, global batch and steps come from afina's overrides; LoRA (r=16, alpha 32, all linear layers), AdamW and the
learning rate are what the campaign gives to afina. Gradients are checkpointed where the overrides ask for it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._rows import prepare_rows, rows_in_training_order
from benchmarks.gpu.measure import DEVICE, DTYPE, IS_CUDA, synchronize
from benchmarks.gpu.train_timed import WARM_UP_STEPS, peak_memory
from trainer.config import TrainConfig
from trainer.engine.flops import ModelFlops, count_flops
from trainer.engine.peak_flops import peak_flops
from trainer.models.embedded import resolve

MICRO_ROWS = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Train once and write what the steps took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--padding-free", action="store_true", help="rows end to end instead of padded")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels, on a GPU")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args(arguments)
    config, tokenizer, data = prepare_rows(asked.overrides)
    steps = config.batch.max_steps
    assert steps is not None, "batch.max_steps says how many steps are timed"
    rows = rows_in_training_order(config, data, steps)
    with tempfile.TemporaryDirectory() as output:
        seconds, losses, flops = train(asked, config, tokenizer, rows, output)
    size = config.batch.global_size
    tokens = [sum(len(row.ids) for row in rows[k * size : (k + 1) * size]) for k in range(steps)]
    timed = list(range(WARM_UP_STEPS, steps)) or [0]
    useful_flops = sum(flops_of(flops, rows[k * size : (k + 1) * size]) for k in timed)
    peak = peak_flops(DEVICE, DTYPE).per_second
    found = {
        "median_step_seconds": sorted(seconds[k] for k in timed)[len(timed) // 2],
        "step_seconds": [round(s, 4) for s in seconds],
        "useful_tokens_per_second": sum(tokens[k] for k in timed) / sum(seconds[k] for k in timed),
        "useful_flops_utilization": useful_flops / sum(seconds[k] for k in timed) / peak,
        "kernels": "Liger's" if asked.liger and IS_CUDA else "none",
        "losses": losses,
    }
    asked.result.write_text(json.dumps(found | peak_memory()))


def train(
    asked: argparse.Namespace, config: TrainConfig, tokenizer: Any, rows: list[Any], output: str
) -> tuple[list[float], list[float], ModelFlops]:
    """Return the seconds and the loss of each step, and what the model costs by afina's count."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    masked = [np.where(row.loss_mask, row.ids, -100).tolist() for row in rows]
    dataset = Dataset.from_dict({"input_ids": [row.ids.tolist() for row in rows], "labels": masked})
    checkpointing = bool(config.model.gradient_checkpointing)
    settings = SFTConfig(
        output_dir=output,
        per_device_train_batch_size=MICRO_ROWS,
        gradient_accumulation_steps=config.batch.global_size // MICRO_ROWS,
        max_steps=config.batch.max_steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=IS_CUDA,
        use_cpu=not IS_CUDA,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        max_length=None,
        padding_free=asked.padding_free,
        train_sampling_strategy="sequential",
        use_liger_kernel=asked.liger and IS_CUDA,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    model, clock = adapted_model(config, asked.attention, checkpointing), make_clock()
    flops = count_flops(model)
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock]
    )
    trainer.train()
    losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
    return clock.seconds, losses, flops


def flops_of(flops: ModelFlops, rows: list[Any]) -> float:
    """Return what rows cost, each computed alone; the output layer at its labels, as in afina."""
    labels = sum(int(np.count_nonzero(row.loss_mask[1:])) for row in rows)
    return flops.of_rows(np.asarray([len(row.ids) for row in rows]), labels)


def adapted_model(config: TrainConfig, attention: str, checkpointing: bool) -> Any:
    """Load the base in bf16 on the GPU (fp32 on a CPU) with LoRA on all its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        resolve(config.model.name_or_path, config.model.revision),
        dtype=torch.bfloat16 if IS_CUDA else torch.float32,
        attn_implementation=attention,
        device_map={"": 0} if IS_CUDA else None,
    )
    model.config.use_cache = False
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    if checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def make_clock() -> Any:
    """Return a callback that times each step between two synchronisations."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """``seconds``: of each step so far."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if IS_CUDA and state.global_step == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            synchronize()
            self.seconds.append(time.perf_counter() - self.begin)

    return Clock()


if __name__ == "__main__":
    main()
