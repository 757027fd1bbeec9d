"""Write and read a training state in parts, one a rank: safetensors, any world size to any other.

A part holds whole tensors: those that are assigned to its rank. Each rank writes, reads back and hashes its own, at the
same time as the others; the marker puts the hashes together. At a resume each tensor is read by one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.tensors import save_verified
from trainer.distributed.process_group import World, gather_objects
from trainer.errors import CheckpointError
from trainer.files import sha256

FOLDER = "state"  # in a checkpoint


def write_part(partial: Path, state: dict[str, Tensor], world: World) -> tuple[str | None, dict[str, Any]]:
    """Write this rank's part. A collective.

    Args:
        partial: the folder that the checkpoint is written in; it exists.
        state: the tensors that are assigned to this rank.
        world: this process.

    Returns:
        What went wrong on any rank, ``None`` when nothing did; and the manifest entries of all parts.
    """
    file = partial / FOLDER / f"part-{world.rank:05d}-of-{world.world_size:05d}.safetensors"
    failure, entries = None, {}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_verified(state, file)
        entries[str(file.relative_to(partial))] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = f"rank {world.rank}: {error}"
    found = gather_objects((failure, entries))
    merged = {name: entry for _, entries in found for name, entry in entries.items()}
    return next((failure for failure, _ in found if failure is not None), None), merged


def open_parts(folder: Path) -> Callable[[str], Tensor | None]:
    """Return what reads a tensor by its name from whichever part has it; ``None`` where none does.

    Raises:
        CheckpointError: a part is missing.
    """
    parts = sorted((folder / FOLDER).glob("part-*-of-*.safetensors"))
    count = int(parts[0].stem.rpartition("-")[2]) if parts else 1
    if len(parts) != count:
        reason = f"has {len(parts)} of its {count} parts; each rank writes one, where run.dir is"
        raise CheckpointError(str(folder / FOLDER), reason=reason, hint="put run.dir on a disk that all nodes share")
    where: dict[str, Path] = {}
    for part in parts:
        with safe_open(part, "pt") as tensors:
            where |= dict.fromkeys(tensors.keys(), part)

    def read(name: str) -> Tensor | None:
        if name not in where:
            return None
        with safe_open(where[name], "pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
            return found

    return read
