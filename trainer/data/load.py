"""Load the data of a run: prepare its tables, mix their rows, split training from held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.dataset_spec import DatasetSpec, parse_dataset_specs
from trainer.config.schema import DataConfig, TrainConfig
from trainer.data.mixture import ConcatenatedTables, concatenate_tables, limit_rows, mix_rows
from trainer.data.prepare import checks
from trainer.data.prepare.prepare import default_cache, prepare
from trainer.data.prepare.rejections import first_refused
from trainer.data.prepare.table import PreparedTable
from trainer.data.run_data import Data, Rows
from trainer.data.templates.template import Template
from trainer.data.validation_split import split_rows
from trainer.errors import DataError

NAMED_REFUSED = 3


def load_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Prepare (or find) the tables and split them. Needs no process group; every rank gets the same.

    Raises:
        DataError: a source cannot be used, more rows are refused than ``data.max_refused`` allows, or there are fewer
            training rows than ``batch.global_size``.
    """
    tables = _prepare_all(config.data, tokenizer)
    _check_refused(config.data, tables)
    data = _split(config, tokenizer, tables, must_train=True)
    if config.batch.global_size > len(data.train):
        raise DataError(
            "batch.global_size",
            value=config.batch.global_size,
            reason=f"is more than the {len(data.train)} training rows",
            hint=f"batch.global_size={len(data.train)} or less",
        )
    return data


def inspect_data(config: TrainConfig, tokenizer: Any) -> Data:
    """Load data that may not be good enough to train on, to look at it: as :func:`load_data`, but neither refused rows
    nor too few rows are an error.

    Raises:
        DataError: a source cannot be used, or holds no usable row.
    """
    return _split(config, tokenizer, _prepare_all(config.data, tokenizer), must_train=False)


def _parse_specs(data_config: DataConfig, path: Any) -> list[DatasetSpec]:
    c = data_config
    return parse_dataset_specs(path, c.format, c.columns, c.split, c.revision, c.subset)


def _prepare_all(data_config: DataConfig, tokenizer: Any) -> list[PreparedTable]:
    """Prepare the tables of all parts; that of a validation file is the last."""
    parts = _parse_specs(data_config, data_config.path)
    if isinstance(data_config.validation, str):
        parts += _parse_specs(data_config, data_config.validation)
    cache = Path(data_config.cache_dir).expanduser() if data_config.cache_dir else default_cache()
    return [prepare(part, data_config, tokenizer, cache) for part in parts]


def _check_refused(data_config: DataConfig, tables: Sequence[PreparedTable]) -> None:
    """Raise when more rows are refused than ``data.max_refused`` allows."""
    refused = sum(table.refused for table in tables)
    rows = sum(len(table) + table.refused + table.dropped for table in tables)
    limit = data_config.max_refused
    if refused <= (limit * rows if isinstance(limit, float) else limit):
        return
    concerned = [table for table in tables if table.refused]
    on_too_long = data_config.on_too_long
    first = [line for table in concerned for line in first_refused(table.refused_file, NAMED_REFUSED, on_too_long)]
    files = ", ".join(str(table.refused_file) for table in concerned)
    too_long = any(f.kind == "too_long" and f.level == "refused" for table in concerned for f in table.findings)
    raise DataError(
        "data.max_refused",
        value=limit,
        reason=f"{refused:,} of {rows:,} rows cannot be used: {'; '.join(first[:NAMED_REFUSED])}"
        f"{'; …' if refused > NAMED_REFUSED else ''} (all of them are in {files})",
        hint=f"fix them, or data.max_refused={refused} to train without them"
        + (", or for the too long ones data.max_length or data.on_too_long=drop" if too_long else ""),
    )


def _split(config: TrainConfig, tokenizer: Any, tables: Sequence[PreparedTable], must_train: bool) -> Data:
    """Mix the tables' rows, split them into training and held-out rows, and check them."""
    data_config, seed = config.data, config.run.seed
    parts = _parse_specs(data_config, data_config.path)
    mixture = concatenate_tables(tables[: len(parts)])
    found = [finding for table in tables for finding in table.findings]
    if isinstance(data_config.validation, str):
        held_out = concatenate_tables(tables[len(parts) :])
        train_rows, validation = np.arange(len(mixture)), Rows(held_out, np.arange(len(held_out)))
    else:
        train_rows, validation = _hold_out(mixture, data_config.validation, seed, must_train)
    train_rows = mix_rows(train_rows, mixture.starts, parts, seed)
    train = Rows(mixture, limit_rows(train_rows, data_config.max_rows, seed))
    if validation.tables is not mixture:
        names = validation.tables.row_name
        found += checks.check_leakage(mixture.hashes[0][train.indices], validation.tables.hashes[0], names)
    found += checks.check_mixture(mixture.hashes[1], mixture.starts, mixture.row_name)
    found += checks.check_row_count(len(train))
    template = Template.from_config(tokenizer, data_config)
    found += checks.check_template_kwargs(template.unread_kwargs())
    ends, opening = tuple(template.end_ids()), tuple(template.opening_ids())
    return Data(train, validation, _hash(train, validation), ends, tuple(tables), tuple(found), opening)


def _hold_out(
    mixture: ConcatenatedTables, validation: int | float, seed: int, must_train: bool
) -> tuple[np.ndarray, Rows]:
    """Split a mixture's rows into those to train on and those held out; none where none would be left to train on,
    unless ``must_train``."""
    try:
        train_rows, held_out = split_rows(mixture.hashes[0], validation, seed)
    except DataError:
        if must_train:
            raise
        train_rows, held_out = np.arange(len(mixture)), np.arange(0)
    return train_rows, Rows(mixture, held_out)


def _hash(train: Rows, validation: Rows) -> str:
    digest = hashlib.sha256()
    for rows in (train, validation):
        digest.update("".join(p.fingerprint for p in rows.tables.parts).encode() + rows.indices.tobytes())
    return digest.hexdigest()[:32]
