"""Build a run's loop from overrides without its folder, in a script of cases that `run_cases` starts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from tests.helpers.cases import record_cases
from tests.helpers.mixtures import FAMILIES, mixture
from trainer.checkpoint.run_folder import Run
from trainer.config import TrainConfig, load
from trainer.data.batching.global_batch import global_batch
from trainer.data.load import load_data
from trainer.distributed import process_group as distributed
from trainer.engine.whole_state import gather_state
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.tracker import Tracker
from trainer.training.build import Built, build
from trainer.training.job import Job, create_checkpointer, create_loop, create_schedule
from trainer.training.loop import Loop
from trainer.training.monitor import EvalMonitor
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
    """Start the process group, build loops in it, and record cases."""

    def __init__(self) -> None:
        self.world = distributed.from_environment()
        distributed.init(self.world)

    def config(self, *overrides: str) -> TrainConfig:
        return load([*COMMON, *overrides])

    def loop(self, config: TrainConfig, folder: Path | None = None) -> Loop:
        job, built = self.job(config, folder)
        return create_loop(
            job,
            built,
            checkpointer=create_checkpointer(job, built),
            tracker=Tracker(),
            monitor=EvalMonitor(config.eval),
            schedule=create_schedule(job),
            kind=Loop,
        )

    def job(self, config: TrainConfig, folder: Path | None = None) -> tuple[Job, Built]:
        """What a run starts from, and what it trains."""
        base = resolve(config.model.name_or_path)
        tokenizer = load_tokenizer(base, config.model)
        data = load_data(config, tokenizer)
        built = build(config, self.world, base, data, tokenizer)
        job = Job(
            config=config,
            world=self.world,
            base_dir=base,
            tokenizer=tokenizer,
            data=data,
            run=Run(folder or Path(tempfile.gettempdir())),
            stop=StopRequest(),
            begin=0.0,
        )
        return job, built

    def shared_folder(self) -> Path:
        """A new folder that every rank knows."""
        return Path(distributed.from_main(tempfile.mkdtemp()))

    def record(self, cases: Mapping[str, Callable[[Bench], Any]]) -> NoReturn:
        """Run the cases and end this process; what rank 0's return is recorded in the folder of the first argument."""
        bound = {name: partial(case, self) for name, case in cases.items()}
        record_cases(bound, Path(sys.argv[1]), is_main=self.world.is_main, barrier=distributed.barrier)
        distributed.barrier()
        distributed.shutdown()
        distributed.leave(0)

    def record_models(
        self,
        save: Callable[[Bench, Path], None],
        compare: Callable[..., Any],
        cases: Mapping[str, tuple[str, list[str]]],
    ) -> NoReturn:
        """Record what ``compare`` says of each case, a model's name and overrides; ``save`` makes all models first."""
        shared = self.shared_folder()
        save(self, shared)
        self.record(
            {
                case: partial(compare, shared=shared, name=name, overrides=overrides)
                for case, (name, overrides) in cases.items()
            }
        )


def reference_batches(loop: Loop, steps: int = STEPS) -> list[list[dict[str, Any]]]:
    train, seed, size = loop.data.train, loop.config.run.seed, loop.config.batch.global_size
    return [train.examples(global_batch(seed, step, len(train), size)) for step in range(steps)]


def gather_weights(loop: Loop) -> dict[str, Tensor]:
    """Return the fp32 master of each trained tensor, whole, by name; on rank 0. A collective."""
    return {n.removeprefix("weight/"): t for n, t in gather_state(loop.engine).items() if n.startswith("weight/")}


def save_mixtures(bench: Bench, families: Iterable[str] = FAMILIES) -> Path:
    """A tiny model of each family with experts, and the tiny tokenizer beside it, in a folder of all ranks."""
    folder, config = bench.shared_folder(), bench.config()
    tokenizer = load_tokenizer(resolve(config.model.name_or_path), config.model)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "initializer_range": 0.05}
    for name in families if bench.world.is_main else ():
        mixture(name, **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    distributed.barrier()
    return folder
