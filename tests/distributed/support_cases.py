"""What the scripts under torchrun share: build a run from overrides without its folder, step it, compare it."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from trainer.checkpoint import checkpointer as checkpoint
from trainer.config import TrainConfig, load
from trainer.data.batching.global_batch import global_batch
from trainer.data.load import load_data
from trainer.distributed import process_group as distributed
from trainer.evaluation.generator import Generator
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.tracker import Tracker
from trainer.training.build import build
from trainer.training.loop import Loop
from trainer.training.stop_request import StopRequest

STEPS = 5
COMMON = [
    "debug=tiny",
    "batch.global_size=8",
    f"batch.max_steps={STEPS}",
    "optim.learning_rate=0.01",
    "optim.max_grad_norm=0.5",  # the tiny model's norms are above it: clipping is at work
    "optim.weight_decay=0.1",
    "method.dropout=0.0",
    # Adam divides by the gradient's own size: an element whose gradient is rounding noise moves by a whole learning
    # rate in a direction of chance. A larger eps leaves such elements where they are, so that what is compared is the
    # gradient and not the chance.
    "optim.eps=1e-5",
]


class Bench:
    """One process's view of a torchrun of many cases; results go to a JSON file from rank 0."""

    def __init__(self) -> None:
        self.world = distributed.from_environment()
        self.results: dict[str, Any] = {}
        distributed.init(self.world)

    def config(self, *overrides: str) -> TrainConfig:
        return load([*COMMON, *overrides])

    def loop(self, config: TrainConfig, folder: Path | None = None) -> Loop:
        base = resolve(config.model.name_or_path)
        tokenizer = load_tokenizer(base, config.model)
        data = load_data(config, tokenizer, lambda _: None)
        built = build(config, self.world, base, data, tokenizer)
        lockstep = config.zero.stage == 3
        generator = Generator(built.engine.model, tokenizer, config.generate, data.end_ids, self.world.device, lockstep)
        who = checkpoint.identity(config, data.fingerprint)
        run = folder or Path(tempfile.gettempdir())
        return Loop(
            config,
            self.world,
            data,
            built.packing,
            built.engine,
            generator,
            Tracker(),
            built.meter,
            StopRequest(),
            run,
            who,
            built.allocation,
        )

    def note(self, case: str, value: Any) -> None:
        if self.world.is_main:
            self.results[case] = value
            print(f"{case}: {value}", flush=True)

    def finish(self) -> NoReturn:
        """Write the results and end this process."""
        if self.world.is_main:
            Path(sys.argv[1]).write_text(json.dumps(self.results))
        distributed.barrier()
        distributed.shutdown()
        distributed.leave(0)


def reference_batches(loop: Loop, steps: int = STEPS) -> list[list[dict[str, Any]]]:
    keys, train = loop.config, loop.data.train
    return [
        train.examples(global_batch(keys.run.seed, step, len(train), keys.batch.global_size)) for step in range(steps)
    ]
