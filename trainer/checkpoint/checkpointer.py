"""Save and restore checkpoints that are either complete or not there.

``checkpoints/step-00000120/`` holds the adapter (stock PEFT), ``state.safetensors`` (fp32 masters and moments) and
``state.json``; ``method=full`` has its state in parts, one a rank, in ``state/``. See ``commit`` and ``resume``, too.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.checkpoint.commit import archive_after, checkpoint_dir, commit, complete, delete_old, find_corruption
from trainer.checkpoint.sharded import open_parts, write_part
from trainer.checkpoint.tensors import save_verified
from trainer.compat.deepspeed import load_checkpoint
from trainer.config.identity import saved_value
from trainer.config.messages import as_typed
from trainer.config.schema import CheckpointConfig
from trainer.distributed.process_group import from_main
from trainer.engine.whole_state import (
    StateOwner,
    assign_ranks,
    gather_live,
    gather_state,
    loss_scaler_state,
    restore_loss_scaler,
    restore_state,
)
from trainer.errors import AfinaError, CheckpointError
from trainer.files import parse_json, partial_path

STATE_FILE = "state.safetensors"
METHOD_STATE = "ranks/"  # prefix of what the method keeps in it; AdaLoRA's ranks were the first
DEEPSPEED = "deepspeed"  # the folder of all weights in checkpoints of older versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint says beside the state itself.

    Attributes:
        step: updates taken so far; 0 without a checkpoint.
        monitor_state: what was saved as such.
        record: of the step, if its evaluation is still to come.
        decays_all: the run's biases and norms decay as all else does; they did in 0.2, which did not say so.
    """

    step: int = 0
    monitor_state: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    decays_all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointer:
    """Writes and reads the checkpoints of one run. Every method is a collective.

    Attributes:
        engine: of the state that is saved and restored.
        run_dir: the run folder.
        run_identity: what the run must share with a checkpoint (``config.run_identity``).
        config: the ``checkpoint`` group: how many are kept.
        prunes: delete older checkpoints after each save; else whoever saves calls :meth:`prune` when they can go.
    """

    engine: StateOwner
    run_dir: Path
    run_identity: dict[str, Any]
    config: CheckpointConfig
    prunes: bool = True

    def save(
        self,
        step: int,
        *,
        monitor_state: dict[str, Any] | None = None,
        best_step: int | None = None,
        record: dict[str, Any] | None = None,
    ) -> bool:
        """Save one checkpoint; a disk that is full costs a warning, not the run.

        Args:
            step: updates taken so far.
            monitor_state: what the run knows of its evaluations, for :meth:`restore`.
            best_step: the step of the best evaluation; its checkpoint is kept beside ``checkpoint.keep``.
            record: of the step for metrics.jsonl, where its evaluation is still to come.

        Returns:
            Whether the checkpoint is complete. Older ones beyond ``checkpoint.keep`` are deleted after that.
        """
        folder = checkpoint_dir(self.run_dir, step)
        partial = partial_path(folder)
        failure, hashed = self._write(partial)
        if self.engine.world.is_main and failure is None:
            try:
                metadata = self._metadata(step, monitor_state, record)
                (partial / "state.json").write_text(json.dumps(metadata, indent=1))
                commit(partial, folder, hashed)
            except OSError as error:
                failure = str(error)
            else:
                if self.prunes:
                    self.prune(best_step)
        failure = from_main(failure)
        if failure is not None:
            if self.engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            logger.warning("the checkpoint of step %d could not be written (%s); the run goes on", step, failure)
        return failure is None

    def restore(self, folder: Path | None) -> Restored:
        """Restore the engine, the method and the loss scaler. Files are read on rank 0 (``method=full``: on each rank).

        Args:
            folder: a complete checkpoint, as rank 0 found it; ``None`` restores nothing.

        Raises:
            CheckpointError: the checkpoint belongs to another model, method, data, batch size or seed.
        """
        if folder is None:
            return Restored()
        engine = self.engine
        metadata = from_main(_read_metadata(folder) if engine.world.is_main else {})
        if not metadata:
            raise CheckpointError(
                str(folder / "state.json"), reason="is not what a run writes", hint="another checkpoint"
            )
        self._check_identity(folder, metadata["identity"])
        if (folder / DEEPSPEED).exists():
            self._restore_deepspeed(folder, metadata)
        else:
            read = self._open_state(folder)
            restore_state(engine, read.tensor, metadata["step"])
            engine.runtime.restore(from_main(read.method_state()))
        restore_loss_scaler(engine, metadata["loss_scaler"])
        said = metadata.get("watch"), metadata.get("record"), metadata.get("decays_all", True)
        return Restored(metadata["step"], *said)

    def go_back(self, step: int) -> Restored | None:
        """Restore the newest good checkpoint of fewer than ``step`` updates; later ones are set aside. ``None``: there
        is none, and nothing is changed."""
        found: Path | None = None
        if self.engine.world.is_main:
            older = [c for c in complete(self.run_dir / "checkpoints") if c < checkpoint_dir(self.run_dir, step)]
            found = next((c for c in reversed(older) if find_corruption(c) is None), None)
        found = from_main(found)
        if found is None:
            return None
        restored = self.restore(found)
        if self.engine.world.is_main:
            archive_after(self.run_dir, restored.step)
        return restored

    def inspect(self, step: int) -> tuple[Path, str | None]:
        """Return the run's checkpoint of a step, and what is wrong with it: ``None`` when it can be used."""
        folder = checkpoint_dir(self.run_dir, step)
        try:
            corruption = find_corruption(folder) if self.engine.world.is_main else None
        except OSError as error:
            corruption = str(error)
        return folder, from_main(corruption)

    def _write(self, partial: Path) -> tuple[str | None, dict[str, Any]]:
        """Write the state and the adapter and read them back. A collective.

        Returns:
            What went wrong on any rank, the same on all of them; and the manifest entries that are known already.
        """
        engine = self.engine
        state = gather_state(engine, assign_ranks(engine))
        if engine.runtime.trains_base_weights:
            failure = from_main(_make_folder(partial) if engine.world.is_main else None)
            return (failure, {}) if failure is not None else write_part(partial, state, engine.world)
        adapter = gather_live(engine, only_trainable=True)
        state |= {METHOD_STATE + name: tensor for name, tensor in engine.runtime.state().items()}
        failure = None
        if engine.world.is_main:
            failure = _make_folder(partial) or self._write_adapter(partial, state, adapter)
        return from_main(failure), {}

    def _write_adapter(
        self, partial: Path, state: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]
    ) -> str | None:
        """Write the adapter and its whole state into an empty folder; return what went wrong."""
        try:
            self.engine.runtime.save(self.engine.model, partial / "adapter", adapter)
            save_verified(state, partial / STATE_FILE)
        except (OSError, SafetensorError, AfinaError) as error:
            return str(error)
        return None

    def _open_state(self, folder: Path) -> _State:
        """Open the state of a checkpoint: in parts, which every rank reads, or in one file, which rank 0 does."""
        if self.engine.runtime.trains_base_weights:
            return _State(open_parts(folder), {})
        tensors = load_file(str(folder / STATE_FILE)) if self.engine.world.is_main else {}
        return _State(tensors.get, tensors)

    def _restore_deepspeed(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Restore what an older version saved with DeepSpeed: at the world size and stage that it was saved at."""
        engine = self.engine
        if not self.config.trust_pickle:
            raise CheckpointError(
                str(folder),
                reason="is of version 0.1, in pickles, which can hold code of whoever wrote them",
                hint="checkpoint.trust_pickle=true where that was you",
            )
        was, now = (metadata["world_size"], metadata["zero_stage"]), (engine.world.world_size, engine.zero_stage)
        if was != now:
            raise CheckpointError(
                str(folder),
                reason=f"is of an older version, in DeepSpeed's own files, and fits {was[0]} ranks under ZeRO stage "
                f"{was[1]} alone; this run has {now[0]} under stage {now[1]}",
                hint=f"zero.stage={was[1]} on {was[0]} ranks; what it saves from there on fits any",
            )
        try:
            load_checkpoint(engine.deepspeed, str(folder / DEEPSPEED), tag="state")
        except UnpicklingError as error:
            asked = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"asks for more than data ({asked[1] if asked else 'code'}), and was not read"
            raise CheckpointError(str(folder / DEEPSPEED), reason=reason) from error

    def _metadata(
        self, step: int, monitor_state: dict[str, Any] | None, record: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Build ``state.json``."""
        return {
            "step": step,
            "identity": self.run_identity,
            "loss_scaler": loss_scaler_state(self.engine),
            "world_size": self.engine.world.world_size,
            "zero_stage": self.engine.zero_stage,
            "decays_all": self.engine.decays_all,
            "resume": self.config.resume,
            "watch": monitor_state,
            "record": record,
        }

    def prune(self, best_step: int | None) -> None:
        """Delete older checkpoints beyond ``checkpoint.keep``; on rank 0."""
        if not self.engine.world.is_main:
            return
        try:
            delete_old(self.run_dir / "checkpoints", self.config.keep, best_step)
        except OSError as error:  # the new one is complete all the same
            logger.warning("older checkpoints could not be deleted (%s); the run goes on", error)

    def _check_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        for key, value in self.run_identity.items():
            was = saved_value(saved, key)
            if was != value:
                own = "the same data" if key == "data" else as_typed(key, was)
                reason = f"was {was} when the checkpoint was written, and changes what it means"
                hint = f"{own}, or another run.name"
                raise CheckpointError(f"{folder}: {key}", value=value, reason=reason, hint=hint)


@dataclass(frozen=True, slots=True)
class _State:
    """An open state: what reads one tensor, and those that were read already."""

    tensor: Callable[[str], torch.Tensor | None]
    loaded: dict[str, torch.Tensor]

    def method_state(self) -> dict[str, torch.Tensor]:
        """Return what the method has saved."""
        return {n.removeprefix(METHOD_STATE): t for n, t in self.loaded.items() if n.startswith(METHOD_STATE)}


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Read ``state.json``; empty where it is not what a run writes."""
    try:
        found = parse_json((folder / "state.json").read_text())
        whole = all(isinstance(found[name], dict) for name in ("identity", "loss_scaler"))
        return found if whole and isinstance(found["step"], int) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _make_folder(partial: Path) -> str | None:
    """Make an empty folder; return what went wrong."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None
