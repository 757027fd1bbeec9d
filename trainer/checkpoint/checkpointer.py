"""Save and restore checkpoints that are either complete or not there.

``checkpoints/step-00000120/`` holds the adapter (stock PEFT), ``state.safetensors`` (fp32 masters and moments) and
``state.json``; ``method=full`` keeps DeepSpeed's own sharded files in ``deepspeed/`` instead. ``commit`` says how a
folder becomes complete, ``resume`` which one a run resumes from.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer.checkpoint.commit import checkpoint_dir, commit, delete_old, find_corruption
from trainer.checkpoint.sharded import save_sharded
from trainer.config.schema import CheckpointConfig
from trainer.distributed.process_group import from_main
from trainer.engine.engine import Engine
from trainer.engine.whole_state import (
    gather_live,
    gather_state,
    loss_scaler_state,
    restore_loss_scaler,
    restore_state,
)
from trainer.errors import AfinaError, CheckpointError
from trainer.files import partial_path

METHOD_STATE = "ranks/"  # prefix of what the method keeps in state.safetensors; AdaLoRA's ranks were the first
SHARDED = "deepspeed"  # the folder of DeepSpeed's own files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointer:
    """Writes and reads the checkpoints of one run. Every method is a collective.

    Attributes:
        engine: of the state that is saved and restored.
        run_dir: the run folder.
        run_identity: what the run must share with a checkpoint (``config.run_identity``).
        config: the ``checkpoint`` group: how many are kept.
    """

    engine: Engine
    run_dir: Path
    run_identity: dict[str, Any]
    config: CheckpointConfig

    def save(self, step: int, *, monitor_state: dict[str, Any] | None = None, best_step: int | None = None) -> bool:
        """Save one checkpoint; a disk that is full costs a warning, not the run.

        Args:
            step: updates taken so far.
            monitor_state: what the run knows of its evaluations, for :meth:`restore`.
            best_step: the step of the best evaluation; its checkpoint is kept beside ``checkpoint.keep``.

        Returns:
            Whether the checkpoint is complete. Older ones beyond ``checkpoint.keep`` are deleted after that.
        """
        folder = checkpoint_dir(self.run_dir, step)
        partial = partial_path(folder)
        failure, state, adapter = self._collect(partial)
        if self.engine.world.is_main and failure is None:
            try:
                self._write(partial, state, adapter, self._metadata(step, monitor_state))
                commit(partial, folder)
            except (OSError, SafetensorError, AfinaError) as error:
                failure = str(error)
            else:
                self._prune(best_step)
        failure = from_main(failure)
        if failure is not None:
            if self.engine.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            logger.warning("the checkpoint of step %d could not be written (%s); the run goes on", step, failure)
        return failure is None

    def restore(self, folder: Path | None) -> tuple[int, dict[str, Any] | None]:
        """Restore the engine, the method and the loss scaler. Files are read on rank 0 (``method=full``: on each rank).

        Args:
            folder: a complete checkpoint, as rank 0 found it; ``None`` restores nothing.

        Returns:
            Updates taken so far, 0 without a checkpoint; and what was saved as ``monitor_state``.

        Raises:
            CheckpointError: the checkpoint belongs to another model, method, data, batch size or seed.
        """
        if folder is None:
            return 0, None
        engine = self.engine
        metadata = from_main(json.loads((folder / "state.json").read_text()) if engine.world.is_main else {})
        self._check_identity(folder, metadata["identity"])
        step = int(metadata["step"])
        if (folder / SHARDED).exists():
            engine.deepspeed.load_checkpoint(str(folder / SHARDED), tag="state")
        else:
            tensors = load_file(str(folder / "state.safetensors")) if engine.world.is_main else {}
            restore_state(engine, tensors, step)
            method_state = {n.removeprefix(METHOD_STATE): t for n, t in tensors.items() if n.startswith(METHOD_STATE)}
            engine.runtime.restore(from_main(method_state))
        restore_loss_scaler(engine, metadata["loss_scaler"])
        return step, metadata.get("watch")

    def inspect(self, step: int) -> tuple[Path, str | None]:
        """Return the run's checkpoint of a step, and what is wrong with it: ``None`` when it can be used."""
        folder = checkpoint_dir(self.run_dir, step)
        try:
            corruption = find_corruption(folder) if self.engine.world.is_main else None
        except OSError as error:
            corruption = str(error)
        return folder, from_main(corruption)

    def _collect(self, partial: Path) -> tuple[str | None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gather what rank 0 writes: why that failed, the state, the adapter. All weights are written here, sharded."""
        engine = self.engine
        if engine.runtime.trains_base_weights:
            return save_sharded(engine, partial, SHARDED), {}, {}
        state, adapter = gather_state(engine), gather_live(engine, only_trainable=True)
        state |= {METHOD_STATE + name: tensor for name, tensor in engine.runtime.state().items()}
        return None, state, adapter

    def _metadata(self, step: int, monitor_state: dict[str, Any] | None) -> dict[str, Any]:
        """Build ``state.json``."""
        return {
            "step": step,
            "identity": self.run_identity,
            "loss_scaler": loss_scaler_state(self.engine),
            "world_size": self.engine.world.world_size,
            "zero_stage": self.engine.zero_stage,
            "resume": self.config.resume,
            "watch": monitor_state,
        }

    def _write(
        self,
        partial: Path,
        state: dict[str, torch.Tensor],
        adapter: dict[str, torch.Tensor],
        metadata: dict[str, Any],
    ) -> None:
        """Write rank 0's files and read them back."""
        if state:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self.engine.runtime.save(self.engine.model, partial / "adapter", adapter)
            save_file(state, str(partial / "state.safetensors"))
            reread = load_file(str(partial / "state.safetensors"))
            if any(not torch.equal(reread[name], tensor) for name, tensor in state.items()):
                raise CheckpointError(str(partial / "state.safetensors"), reason="does not read back as it was written")
        (partial / "state.json").write_text(json.dumps(metadata, indent=1))

    def _prune(self, best_step: int | None) -> None:
        """Delete older checkpoints beyond ``checkpoint.keep``."""
        try:
            delete_old(self.run_dir / "checkpoints", self.config.keep, best_step)
        except OSError as error:  # the new one is complete all the same
            logger.warning("older checkpoints could not be deleted (%s); the run goes on", error)

    def _check_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        for key, value in self.run_identity.items():
            was = saved.get(key)
            if was != value:
                hint = "the same data, or another run.name" if key == "data" else f"{key}={was}, or another run.name"
                reason = f"was {was} when the checkpoint was written, and changes what it means"
                raise CheckpointError(f"{folder}: {key}", value=value, reason=reason, hint=hint)
