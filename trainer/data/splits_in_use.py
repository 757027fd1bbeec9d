"""Decide which split of which data set is held out, and tell of the splits that a run leaves alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer.config.dataset_spec import DatasetSpec, is_glob, is_split_name
from trainer.config.messages import listing
from trainer.data.prepare.finding import MAX_PLACES, Finding
from trainer.data.prepare.table import PreparedTable
from trainer.data.sources.open import list_splits
from trainer.errors import DataError


def held_out_specs(validation: str, parts: Sequence[DatasetSpec], given: Sequence[DatasetSpec]) -> list[DatasetSpec]:
    """Return the data sets of held-out rows.

    Args:
        validation: ``data.validation``: the name of a split of ``parts``, or a path.
        parts: those to train on.
        given: what the path means, when it is one.

    Returns:
        That split of every part that can have splits; or the path's own data sets, of a folder that has splits its
        validation or test split rather than its training rows.

    Raises:
        DataError: a split is named, and the parts are plain files.
    """
    if not is_split_name(validation) or Path(validation).exists():
        return [_held_out_split(part) for part in given]
    several = [part for part in parts if not (Path(part.path).is_file() and not is_glob(part.path))]
    if not several:
        reason = f"is no path, and {listing([part.path for part in parts])} is a file, which has no splits"
        raise DataError("data.validation", value=validation, reason=reason, hint="data.validation=0.1, or a path")
    return [replace(part, split=validation) for part in several]


def _held_out_split(part: DatasetSpec) -> DatasetSpec:
    found = list_splits(part) if part.split == "train" and os.path.isdir(part.path) else []
    wanted = [split for split in ("validation", "test") if split in found]
    return replace(part, split=wanted[0]) if wanted and (wanted[0] == "validation" or set(found) <= {"test"}) else part


def check_splits(tables: Sequence[PreparedTable]) -> list[Finding]:
    """Tell of files and saved splits that lie with those in use and are used for nothing."""
    used = {file for table in tables for file in table.files}
    found = {left.path: left for table in tables for left in table.left_alone if left.path not in used}
    if not found:
        return []
    shown = [f"{left.name} ({left.split or 'names no split'})" for left in list(found.values())[:MAX_PLACES]]
    more = f" and {len(found) - MAX_PLACES} more" if len(found) > MAX_PLACES else ""
    message = f"not used, as they are of other splits: {', '.join(shown)}{more}"
    splits = [left.split for left in found.values()]
    hint = "data.validation=validation holds that split out" if "validation" in splits else "data.split=NAME takes one"
    return [Finding("other_split", "note", len(found), f"{message} → {hint}", ())]
