"""Run one training run from start to end on this rank."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

from trainer.checkpoint import checkpointer as checkpoint
from trainer.checkpoint.commit import archive_after
from trainer.checkpoint.run_folder import Run, open_run
from trainer.config import TrainConfig, to_yaml
from trainer.data.load import Data, describe, load_data
from trainer.distributed import process_group as distributed
from trainer.distributed.process_group import World
from trainer.engine.meter import device_name
from trainer.engine.rank_allocation import describe as describe_ranks
from trainer.errors import PREEMPTED_EXIT_CODE, AfinaError
from trainer.evaluation.generator import Generator
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer
from trainer.tracking.environment import write_environment
from trainer.tracking.files import write_summary
from trainer.tracking.tracker import Tracker
from trainer.training.build import build
from trainer.training.finish import build_summary, copy_refused, log_result, save_final
from trainer.training.loop import Loop, Outcome
from trainer.training.stop_request import StopRequest


def train(config: TrainConfig, world: World) -> int:
    """One run from start to end on this rank. Returns the exit code; errors are recorded in the run's summary."""
    begin = time.perf_counter()
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if world.is_main else (lambda _: None)
    stop = StopRequest().install()
    folder = resolve(config.model.name_or_path, config.model.revision)
    tokenizer = load_tokenizer(folder, config.model)
    data = load_data(config, tokenizer, say)
    distributed.init(world)
    try:
        run = open_run(config, world, say)
        if run.finished is not None:
            return 0
        try:
            outcome = _run(config, world, run, folder, tokenizer, data, stop, begin)
            distributed.barrier()  # rank 0 may still be writing: a node that leaves early would take it along
        except Exception as error:
            _record_failure(run, error, world, begin)
            raise
        return 0 if outcome.status == "finished" else PREEMPTED_EXIT_CODE
    finally:
        distributed.shutdown()


def _run(
    config: TrainConfig,
    world: World,
    run: Run,
    folder: str,
    tokenizer: Any,
    data: Data,
    stop: StopRequest,
    begin: float,
) -> Outcome:
    built = build(config, world, folder, data, tokenizer)
    who = checkpoint.identity(config, data.fingerprint)
    first_step, watched = checkpoint.load(built.engine, run.resume_from, who, built.allocation)
    generator = Generator(
        built.engine.model, tokenizer, config.generate, data.end_ids, world.device, lockstep=config.zero.stage == 3
    )
    engine, packing, meter, ranks = built.engine, built.packing, built.meter, built.allocation
    loop = Loop(config, world, data, packing, engine, generator, Tracker(), meter, stop, run.folder, who, ranks)
    devices = distributed.gather_objects(device_name(world.device))
    hosts = distributed.gather_objects(socket.gethostname())
    if world.is_main:
        archive_after(run.folder, first_step)
        (run.folder / "config.yaml").write_text(to_yaml(config))
        copy_refused(data, run.folder)
        write_environment(run.folder, {"world_size": world.world_size, "devices": devices, "hosts": hosts})
    loop.tracker = tracker = Tracker.open(
        config,
        run.folder,
        is_main=world.is_main,
        total_steps=loop.total_steps,
        resume_step=first_step,
        facts=built.facts,
    )
    summary: dict[str, Any] = {"status": "failed"}
    try:
        _introduce(tracker, config, data, built.facts, first_step, run)
        outcome = loop.train(first_step, watched)
        if outcome.status == "finished":
            save_final(built.engine, run.folder, tokenizer, config, built.started)
            if built.allocation is not None:
                tracker.say(describe_ranks(built.allocation.ranks()))
        summary = build_summary(outcome, built.facts, run, time.perf_counter() - begin)
        if world.is_main:
            write_summary(run.folder, summary)
        log_result(tracker, config, outcome, run, summary, loop.total_steps)
        return outcome
    except Exception as error:
        summary |= {"error": _error_facts(error, world)}
        raise
    finally:
        tracker.close(summary)


def _introduce(
    tracker: Tracker, config: TrainConfig, data: Data, facts: dict[str, Any], first_step: int, run: Run
) -> None:
    for line in describe(data, config):
        tracker.say(line)
    tracker.say(
        f"model: {config.model.name_or_path} in {facts['dtype']} on {facts['world_size']} × {facts['device']}, "
        f"ZeRO stage {config.zero.stage}; trained {facts['trainable_parameters']:,} of {facts['total_parameters']:,} "
        f"parameters ({facts['trainable_percent']:.2f} %)"
    )
    if facts["experts"] is not None:
        tracker.say(str(facts["experts"]))
    tracker.say(str(facts["packing"]))
    tracker.say(f"run: {run.folder}" + (f", going on after step {first_step}" if first_step else ""))


def _error_facts(error: BaseException, world: World) -> dict[str, Any]:
    kind = error.kind if isinstance(error, AfinaError) else type(error).__name__
    return {"kind": kind, "message": str(error), "rank": getattr(error, "rank", None) or world.rank}


def _record_failure(run: Run, error: Exception, world: World, begin: float) -> None:
    """Whichever rank fails writes it down: rank 0 may never hear of it."""
    write_summary(
        run.folder,
        {
            "status": "failed",
            "steps": run.last_logged_step(),
            "wall_seconds": time.perf_counter() - begin,
            "trainable_parameters": None,
            "total_parameters": None,
            "train_loss": None,
            "metrics": {},
            "error": _error_facts(error, world),
        },
    )
