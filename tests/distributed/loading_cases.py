"""On two ranks: what a rank holds while a model is loaded and split by ZeRO-3, and what comes of it.

``RssAnon`` is memory of this process alone; pages of the model's files (``RssFile``) are shared by the ranks of a node,
and the system takes them back when it needs them.
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import load_file

from tests.distributed.bench import Bench
from tests.helpers.architectures import tiny
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import gather_objects
from trainer.engine.engine import Engine
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import attach, create_runtime
from trainer.models.loading import load_model

CASES = {
    "bf16": [],
    "bf16, offloaded": ["zero=stage3_offload"],
    "nf4": ["method.bits=4"],
}  # fmt: skip
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most that this process held above what it held at the start, looked at each millisecond."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous_bytes()
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ends.is_set():
            self.most = max(self.most, anonymous_bytes())
            time.sleep(1e-3)

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    @property
    def grown_bytes(self) -> int:
        return self.most - self.start


def save_model(folder: Path) -> int:
    """A random model in bf16 in files of 50 MB; its bytes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = tiny("llama", **SIZES).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="50MB")
    return sum(p.numel() * p.element_size() for p in model.parameters())


def differing(model: Any, folder: Path) -> list[str]:
    """Names of the weights that are not, to the bit, what the files hold. A collective."""
    saved = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    found = []
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        with deepspeed.zero.GatheredParameters([parameter]):
            if ".lora_" not in name and not torch.equal(parameter, saved[plain]):
                found.append(name)
    return found


def whole_bytes(bench: Bench, folder: Path) -> int:
    return distributed.from_main(save_model(folder) if bench.world.is_main else None)


def peaks(bench: Bench, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Bytes that each rank grew by until the model was loaded, and until it was split; weights that came out wrong."""
    config = bench.config("zero=stage3", "method.r=2", "model.dtype=bf16", f"model.name_or_path={folder}", *overrides)
    with Peak() as loading:
        base = load_model(str(folder), config.model, config.method, torch.bfloat16, bench.world.device, 3)
        model = attach(base, config.method, seed=0)
    with Peak() as splitting:
        splitting.start = loading.start
        engine = Engine(
            model=model,
            loss=LabelLoss(model),
            config=config,
            world=bench.world,
            dtype=torch.bfloat16,
            runtime=create_runtime(model, config.method),
        )
    grown = gather_objects([loading.grown_bytes, splitting.grown_bytes])
    wrong = differing(engine.model, folder) if config.method.bits == 16 else []
    return {"loading": [g[0] for g in grown], "splitting": [g[1] for g in grown], "wrong": wrong}


if __name__ == "__main__":
    model_dir = Path(sys.argv[2])
    each = {name: partial(peaks, folder=model_dir, overrides=overrides) for name, overrides in CASES.items()}
    Bench().record({"whole": partial(whole_bytes, folder=model_dir), **each})
