"""Load data sets of the ``datasets`` library: from the hub, or from a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.compat.hub import hub_hint, hub_obstacle, was_not_reached, why_not_reached
from trainer.config.dataset_spec import DatasetSpec
from trainer.config.messages import listing, nearest
from trainer.data.sources.readers import chunk_rows, number_rows
from trainer.data.sources.rows import CHUNK_LINES, Chunk
from trainer.data.sources.splits import LeftAlone
from trainer.errors import DataError


def is_saved(folder: Path) -> bool:
    """Return whether ``datasets.save_to_disk`` wrote a folder."""
    one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return one or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path, spec: DatasetSpec) -> Any:
    """Load the split of a saved data set; a data set without splits is taken whole.

    Raises:
        DataError: it has no such split, or cannot be read.
    """
    import datasets

    index = folder / "dataset_dict.json"
    try:
        if not index.is_file():
            whole = datasets.load_from_disk(str(folder))
            if spec.split not in ("train", str(whole.split)):
                reason = f"has no splits: {spec.path} holds one data set"
                raise DataError("data.split", value=spec.split, reason=reason, hint="leave data.split out")
            return whole
        splits = json.loads(index.read_text(encoding="utf-8"))["splits"]
        if spec.split not in splits:
            hint = f"data.split={nearest(spec.split, splits) or splits[0]}" if splits else "save it with its splits"
            raise DataError(
                "data.split", value=spec.split, reason=f"is not in {spec.path}: {_list_splits(splits)}", hint=hint
            )
        return datasets.load_from_disk(str(folder / spec.split))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"was written by save_to_disk, and cannot be read ({_shorten(error)})"
        raise DataError("data.path", value=spec.path, reason=reason, hint="save it again") from error


def other_splits(folder: Path, spec: DatasetSpec) -> tuple[LeftAlone, ...]:
    """Name the splits of a saved data set that are not ``spec.split``."""
    index = folder / "dataset_dict.json"
    splits = json.loads(index.read_text(encoding="utf-8"))["splits"] if index.is_file() else []
    return tuple(LeftAlone(s, f"{folder.name}/{s}", str(folder / s)) for s in splits if s != spec.split)


def load_hub(spec: DatasetSpec) -> Any:
    """Load the split of a hub data set, from the hub or from the cache of an earlier run.

    Raises:
        DataError: the hub has no such data set, revision or split, or cannot be reached.
    """
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    nowhere = "there is no such path on this machine, and"
    hub_obstacle()  # without a network it sets datasets offline
    try:
        return datasets.load_dataset(spec.path, spec.subset, split=spec.split, revision=spec.revision)
    except DatasetNotFoundError as error:
        revision = f" at revision {spec.revision}" if spec.revision else ""
        reason = f"{nowhere} the hub has no such data set{revision}, or keeps it private"
        hint = "correct the path; for a private one: hf auth login"
        raise DataError("data.path", value=spec.path, reason=reason, hint=hint) from error
    except ConnectionError as error:
        raise _not_reached(spec, error) from error
    except Exception as error:  # a builder may raise anything: an unknown split, no default configuration, a bad file
        if was_not_reached(error):
            raise _not_reached(spec, error) from error
        if "split" in str(error).lower():
            reason = f"{spec.path}: {_shorten(error)}"
            raise DataError("data.split", value=spec.split, reason=reason, hint="data.split=NAME") from error
        if "config name" in str(error).lower():
            reason = f"{spec.path}: {_shorten(error)}"
            raise DataError("data.subset", value=spec.subset, reason=reason, hint="data.subset=NAME") from error
        reason = f"cannot be loaded from the hub ({_shorten(error)})"
        hint = "load it with the datasets library, save_to_disk, and name that folder"
        raise DataError("data.path", value=spec.path, reason=reason, hint=hint) from error


def _not_reached(spec: DatasetSpec, error: Exception) -> DataError:
    why = f"the hub cannot be reached ({_shorten(error)})"
    if hub_obstacle() is not None or was_not_reached(error):
        why = why_not_reached()
    reason = f"there is no such path on this machine, it is not cached, and {why}"
    hint = f"correct the path; {hub_hint('data.path', spec.path, 'hf download --repo-type dataset')}"
    return DataError("data.path", value=spec.path, reason=reason, hint=hint)


def read_chunks(table: Any, name: str) -> Iterator[Chunk]:
    """Read the rows of a data set in chunks, numbered from 1.

    Raises:
        DataError: its files are damaged.
    """
    try:
        yield from chunk_rows(number_rows(table.with_format("arrow").iter(CHUNK_LINES), name), 0, name)
    except (OSError, ValueError, OverflowError, ImportError) as error:
        hint = "leave out columns that are no text, or save it again"
        raise DataError(name, reason=f"cannot be read ({_shorten(error)})", hint=hint) from error


def _list_splits(splits: list[str]) -> str:
    return f"it has {listing(splits)}" if splits else "it has no splits"


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
