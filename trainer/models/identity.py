"""Say which model a base is: what finds it on another machine, and a fingerprint that tells it from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.schema import ModelConfig
from trainer.files import parse_json
from trainer.methods.base_record import BaseRecord
from trainer.models.embedded import EMBEDDED, MARKER

SAMPLE_BYTES = 64  # of each tensor: two models of one shape differ in all of them
MAX_HEADER_BYTES = 100_000_000  # what safetensors allows
# Of a config.json, what a copy of a model may have otherwise.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")


def describe_base(model: ModelConfig, base_dir: str) -> BaseRecord:
    """Describe the base of a run.

    Args:
        model: the ``model`` group.
        base_dir: what ``embedded.resolve`` made of it: a folder, or a hub id that is in the cache by now.
    """
    folder = Path(base_dir)
    if not folder.is_dir():
        found = _cached_folder(base_dir, model.revision)
        commit = found.name if found is not None else model.revision
        path = None if found is None else str(found)
        print_ = None if found is None else fingerprint(found)
        return BaseRecord(base_dir, "hub", base_dir, commit, path, print_)
    path = str(folder.resolve())
    name = _embedded_name(folder)
    if name is None:
        return BaseRecord(model.name_or_path, "folder", path=path, fingerprint=fingerprint(folder))
    return BaseRecord(name, "embedded", EMBEDDED[name].hub_id, path=path, fingerprint=fingerprint(folder))


def fingerprint(folder: Path) -> str | None:
    """Hash a model folder: its configuration, and of each tensor name, dtype, shape and first bytes.

    A model of 70 B takes a thousand small reads. How the weights are cut into files does not matter; their dtype does.
    Weights that are pickles are known by the sizes of their files.

    Returns:
        hex digits; ``None`` where the files cannot be read.
    """
    digest = hashlib.sha256()
    try:
        config = parse_json((folder / "config.json").read_bytes())
        digest.update(json.dumps(_without_volatile(config), sort_keys=True).encode())
        shards = sorted(folder.glob("*.safetensors"))
        described = sorted(each for shard in shards for each in _tensors(shard))
        if not shards:
            described = sorted(f"{file.name} {file.stat().st_size}" for file in folder.glob("*.bin"))
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
    digest.update("\n".join(described).encode())
    return digest.hexdigest()[:32]


def _without_volatile(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what a copy may have otherwise; a wrapper's parts have configs of their own in it."""
    parts = {key for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    own = {key: value for key, value in config.items() if key not in VOLATILE}
    return own | {key: {k: v for k, v in config[key].items() if k not in VOLATILE} for key in parts}


def _tensors(shard: Path) -> Iterator[str]:
    """Yield a line for each tensor of a safetensors file, whose header says where each begins."""
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("its header is longer than safetensors allows")
        header: dict[str, Any] = parse_json(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + length + begin)
            sample = file.read(min(SAMPLE_BYTES, end - begin)).hex()
            yield f"{name} {entry['dtype']} {entry['shape']} {sample}"


def _embedded_name(folder: Path) -> str | None:
    """Return which embedded model a folder is, wherever the cache lies."""
    try:
        recipe = parse_json((folder / MARKER).read_bytes())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((name for name, model in EMBEDDED.items() if model.recipe == recipe), None)


def _cached_folder(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None
