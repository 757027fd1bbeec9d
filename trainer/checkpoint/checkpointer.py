"""Checkpoints that are either complete or not there.

``checkpoints/step-00000120/`` holds the adapter (stock PEFT), ``state.safetensors`` (fp32 masters and moments) and
``state.json``; ``method=full`` keeps DeepSpeed's own sharded files in ``deepspeed/`` instead. It is written as
``….partial``, synced, reopened, renamed, and marked with ``COMPLETE`` (sizes and SHA-256 of every file) last of all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.checkpoint.commit import checkpoint_dir, commit, complete, delete_old, find_corruption
from trainer.config.method import METHODS
from trainer.config.schema import CheckpointConfig, TrainConfig
from trainer.distributed.process_group import World, from_main, gather_objects
from trainer.engine.engine import Engine
from trainer.engine.rank_allocation import Allocation
from trainer.engine.whole_state import gather_live, gather_state, loss_scaler_state, restore_loss_scaler, restore_state
from trainer.errors import AfinaError, CheckpointError
from trainer.methods import save_adapter

RANKS = "ranks/"  # names of what AdaLoRA's allocation keeps


def identity(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    """What a run must still have in common with its checkpoint; everything else may change."""
    means = METHODS[config.method.name].keys | {"name"}
    method = {name: value for name, value in asdict(config.method).items() if name in means - {"dropout"}}
    return {
        "model.name_or_path": config.model.name_or_path,
        "model.revision": config.model.revision,
        "batch.global_size": config.batch.global_size,
        "run.seed": config.run.seed,
        "data": data_fingerprint,
        **{f"method.{k}": v for k, v in method.items()},
    }


def save(
    engine: Engine,
    run: Path,
    step: int,
    who: dict[str, Any],
    keys: CheckpointConfig,
    say: Callable[[str], None],
    allocation: Allocation | None = None,
    watch: dict[str, Any] | None = None,
    best_step: int | None = None,
) -> bool:
    """Write one checkpoint; a disk that is full costs a warning, not the run. A collective.

    Args:
        engine: whose trained state is written.
        run: the run folder.
        step: updates taken so far.
        who: the run's :func:`identity`.
        keys: the ``checkpoint`` group; older complete checkpoints beyond ``keep`` are deleted, after the new one is
            complete.
        say: told about a failure.
        allocation: AdaLoRA's ranks, which are saved too.
        watch: what the run knows of its evaluations, for :func:`load`.
        best_step: the best of them, whose checkpoint is kept beside ``keep``.

    Returns:
        Whether the checkpoint is complete.
    """
    folder = checkpoint_dir(run, step)
    partial = folder.with_name(folder.name + ".partial")
    if who["method.name"] == "full":
        state, adapter = {}, {}
        failure = _save_deepspeed(engine, partial)
    else:
        state, adapter = gather_state(engine), gather_live(engine, only_trained=True)
        if allocation is not None:
            state |= {RANKS + name: tensor for name, tensor in allocation.state().items()}
        failure = None
    if engine.world.is_main and failure is None:
        facts = {
            "step": step,
            "identity": who,
            "loss_scaler": loss_scaler_state(engine),
            "world_size": engine.world.world_size,
            "zero_stage": engine.zero_stage,
            "resume": keys.resume,
            "watch": watch,
        }
        try:
            _write(engine, partial, folder, state, adapter, facts)
        except (OSError, SafetensorError, AfinaError) as error:
            failure = str(error)
        else:
            _delete_old(run / "checkpoints", keys.keep, best_step, say)
    failure = from_main(failure)
    if failure is not None:
        if engine.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        say(f"warning: the checkpoint of step {step} could not be written ({failure}); the run goes on")
    return failure is None


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from: for ``auto`` the newest complete one of the run, or ``None``.

    Raises:
        CheckpointError: a named folder is not a complete checkpoint, or the newest one does not read as it was written.
    """
    if resume == "never":
        return None
    there = complete(run / "checkpoints")
    # A run that went back to a named checkpoint and was then cut short goes on from what it has made since.
    if resume != "auto" and not (there and _resumed_by(there[-1]) == resume):
        verify(Path(resume), run)
        return Path(resume)
    if not there:
        return None
    verify(there[-1], run)
    return there[-1]


def verify(folder: Path, run: Path) -> None:
    """Compare a checkpoint's files with the sizes and hashes in its marker.

    Raises:
        CheckpointError: names the file, and the newest other checkpoint that is good.
    """
    fault = find_corruption(folder)
    if fault is None:
        return
    others = [c for c in complete(run / "checkpoints") if c != folder and find_corruption(c) is None]
    hint = f"checkpoint.resume={others[-1]}" if others else "checkpoint.resume=never run.overwrite=true starts anew"
    raise CheckpointError(fault, reason="so the checkpoint cannot be used", hint=hint)


def load(
    engine: Engine, folder: Path | None, who: dict[str, Any], allocation: Allocation | None = None
) -> tuple[int, dict[str, Any] | None]:
    """Restore a run from a checkpoint. A collective; the files are read on rank 0 (full: on each rank).

    Args:
        engine: freshly built.
        folder: what rank 0 found; other ranks pass it too.
        who: the run's :func:`identity`.
        allocation: AdaLoRA's ranks, which are restored too.

    Returns:
        Updates taken so far, 0 without a checkpoint; and what was saved as ``watch``.

    Raises:
        CheckpointError: the checkpoint belongs to another model, method, data, batch size or seed.
    """
    if folder is None:
        return 0, None
    facts = json.loads((folder / "state.json").read_text()) if engine.world.is_main else {}
    facts = from_main(facts)
    for key, value in who.items():
        saved = facts["identity"].get(key)
        if saved != value:
            raise CheckpointError(
                f"{folder}: {key}",
                value=value,
                reason=f"was {saved} when the checkpoint was written, and changes what it means",
                hint=f"{key}={saved}, or another run.name" if key != "data" else "the same data, or another run.name",
            )
    step = int(facts["step"])
    if (folder / "deepspeed").exists():
        engine.deepspeed.load_checkpoint(str(folder / "deepspeed"), tag="state")
    else:
        tensors = load_file(str(folder / "state.safetensors")) if engine.world.is_main else {}
        restore_state(engine, tensors, step)
        if allocation is not None:
            held = {n.removeprefix(RANKS): t for n, t in tensors.items() if n.startswith(RANKS)}
            allocation.restore(from_main(held))
    restore_loss_scaler(engine, facts["loss_scaler"])
    return step, facts.get("watch")


def find_step(run: Path, step: int, world: World) -> tuple[Path, str | None]:
    """The run's checkpoint of a step, and what is wrong with it: ``None`` when it can be used. A collective."""
    folder = checkpoint_dir(run, step)
    try:
        fault = find_corruption(folder) if world.is_main else None
    except OSError as error:
        fault = str(error)
    return folder, from_main(fault)


def _save_deepspeed(engine: Engine, partial: Path) -> str | None:
    """Each rank's shard, by DeepSpeed; what went wrong on any rank is told on all of them."""
    fault = None
    if engine.world.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "deepspeed").mkdir(parents=True)
        except OSError as error:
            fault = str(error)
    fault = from_main(fault)
    if fault is not None:
        return fault
    faults: list[str] = []
    files = engine.deepspeed.checkpoint_engine
    write = files.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as error:  # of a full disk torch says RuntimeError
            # Raised here, it would leave the other ranks waiting in DeepSpeed's next collective.
            faults.append(f"rank {engine.world.rank}: {path}: {error}")

    files.save = save
    try:
        engine.deepspeed.save_checkpoint(str(partial / "deepspeed"), tag="state")
    except OSError as error:
        faults.append(f"rank {engine.world.rank}: {error}")
    finally:
        files.save = write
    return next((fault for of_rank in gather_objects(faults) for fault in of_rank), None)


def _write(
    engine: Engine,
    partial: Path,
    folder: Path,
    state: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    facts: dict[str, Any],
) -> None:
    if state:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_adapter(engine.model, partial / "adapter", adapter, engine.start)
        save_file(state, str(partial / "state.safetensors"))
        reread = load_file(str(partial / "state.safetensors"))
        if any(not torch.equal(reread[name], tensor) for name, tensor in state.items()):
            raise CheckpointError(str(partial / "state.safetensors"), reason="does not read back as it was written")
    (partial / "state.json").write_text(json.dumps(facts, indent=1))
    commit(partial, folder)


def _delete_old(checkpoints: Path, keep: int, best_step: int | None, say: Callable[[str], None]) -> None:
    try:
        delete_old(checkpoints, keep, best_step)
    except OSError as error:  # the new one is complete all the same
        say(f"warning: older checkpoints could not be deleted ({error}); the run goes on")


def _resumed_by(folder: Path) -> str | None:
    """``checkpoint.resume`` of the run that wrote a checkpoint; ``None`` when it cannot be read."""
    try:
        return str(json.loads((folder / "state.json").read_text())["resume"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
