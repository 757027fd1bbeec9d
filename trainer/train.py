"""Load, build, run: what every rank of a job does. ``python -m trainer.train`` and torchrun start here."""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import checkpointer as checkpoint
from trainer.distributed import process_group as distributed
from trainer.engine.rank_allocation import Allocation
from trainer.engine.rank_allocation import describe as describe_ranks
from trainer.evaluation.multiple_choice import letter_tokens
from trainer.config import TrainConfig, load, to_yaml
from trainer.config.method import given
from trainer.data.load import Data, describe, load_data
from trainer.data.batching.packing import Packing
from trainer.files import no_room
from trainer.distributed.process_group import World
from trainer.engine.engine import Engine
from trainer.errors import AfinaError
from trainer.models.embedded import resolve
from trainer.training.finish import conclude, copy_refused, save_final, summarise
from trainer.evaluation.generator import Sampler
from trainer.training.loop import Loop, Outcome
from trainer.kernels.label_loss import LabelLoss
from trainer.methods import (
    OrthogonalTerm,
    attach,
    count_parameters,
    digests,
    start_in_base,
    trainable_parameters,
)
from trainer.methods.targets import unreached
from trainer.models.loading import compute_dtype, load_model, load_tokenizer
from trainer.engine.verify_trie import choose_packing
from trainer.silence import quiet
from trainer.engine.meter import Meter, device_name, give_back_memory
from trainer.checkpoint.run_folder import Run, open_run
from trainer.checkpoint.commit import set_aside_later
from trainer.training.stop_request import StopRequest
from trainer.tracking import Tracker, write_environment, write_summary

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL: the same command again goes on where this one was stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code tells how it ended.

    0 finished, 2 config, data or model, 3 checkpoint, 4 launch, 5 loss not finite, 75 stopped on request and saved.
    """
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description="train one run")
    parser.add_argument("--config", type=Path, default=None, help="a run's config.yaml, to repeat it")
    parser.add_argument("overrides", nargs="*", help="key=value and group=option")
    known = parser.parse_args(arguments)
    world = distributed.from_environment()
    quiet()
    try:
        return train(load(known.overrides, known.config), world)
    except Exception as error:
        told = error if isinstance(error, AfinaError) else no_room(error)
        if told is None:
            raise
        if told.rank in (None, world.rank):
            rank = f"[rank {world.rank}] " if world.world_size > 1 else ""
            print(f"{rank}error: {told}", file=sys.stderr, flush=True)
        return told.exit_code


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


@dataclass(slots=True)
class Built:
    """A model under DeepSpeed, what is to be said of it, the meter of its cost, and what adapters started as."""

    engine: Engine
    allocation: Allocation | None
    packing: Packing
    facts: dict[str, Any]
    meter: Meter
    started: dict[str, str]


def build(config: TrainConfig, world: World, folder: str, data: Data, tokenizer: Any) -> Built:
    """Load the base, attach what is trained, choose the packing, hand it to DeepSpeed. The process group must be up."""
    dtype = compute_dtype(config.model.dtype, world.device, config.zero.stage)
    base = load_model(folder, config.model, config.method, dtype, world.device, config.zero.stage)
    if "choice_accuracy" in config.eval.metrics:
        letter_tokens(data.validation)  # said now, not after the first hours
    method, steps = config.method, data.total_steps(config.batch)
    text = tokenizer(method.init_text, add_special_tokens=False)["input_ids"] if method.init_text else None
    model = attach(base, method, config.run.seed, steps, text)
    started = digests(trainable_parameters(model)) if world.is_main and method.name != "full" else {}
    start = start_in_base(model, method)
    orthogonal = OrthogonalTerm(model, given(method.orth_reg_weight)) if method.name == "adalora" else None
    if world.device.type == "cuda" and config.zero.stage < 3 and config.method.bits == 16:
        model = model.to(world.device)  # where DeepSpeed would put it; the packing is tried where it will run
    loss = LabelLoss(model)
    # Rank 0's finding counts: hosts of unlike hardware must not choose unlike packings.
    packing, why = distributed.from_main(choose_packing(model, loss, config, data, tokenizer.pad_token_id))
    give_back_memory(world.device)
    trained, total = count_parameters(model)
    facts = {
        "trainable_parameters": trained,
        "total_parameters": total,
        "trainable_percent": 100 * trained / total,
        "world_size": world.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": world.device.type,
        "packing": why,
        "experts": unreached(base, method.bits) if method.name != "full" else None,
    }
    meter = Meter(world, model, dtype)
    engine = Engine(model, loss, config, world, dtype, orthogonal, start)
    allocation = Allocation(engine) if method.name == "adalora" else None
    return Built(engine, allocation, packing, facts, meter, started)


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
    sampler = Sampler(
        built.engine.model, tokenizer, config.generate, data.end_ids, world.device, lockstep=config.zero.stage == 3
    )
    engine, packing, meter, ranks = built.engine, built.packing, built.meter, built.allocation
    loop = Loop(config, world, data, packing, engine, sampler, Tracker(), meter, stop, run.folder, who, ranks)
    devices = distributed.gather_objects(device_name(world.device))
    hosts = distributed.gather_objects(socket.gethostname())
    if world.is_main:
        set_aside_later(run.folder, first_step)
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
        summary = summarise(outcome, built.facts, run, time.perf_counter() - begin)
        if world.is_main:
            write_summary(run.folder, summary)
        conclude(tracker, config, outcome, run, summary, loop.total_steps)
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


if __name__ == "__main__":
    distributed.leave(main())
