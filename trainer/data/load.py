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
from trainer.data.prepare.grouping import BY_ROW
from trainer.data.prepare.prepare import default_cache, prepare
from trainer.data.prepare.rejections import first_refused, summarize_hints, summarize_rows
from trainer.data.prepare.table import PreparedTable
from trainer.data.prepare.turn_checks import check_template_kwargs
from trainer.data.run_data import Data, Rows
from trainer.data.splits_in_use import check_splits, held_out_specs
from trainer.data.templates.rendered_rows import RenderedRows
from trainer.data.templates.template import Template
from trainer.data.validation_split import count_wanted, join_groups, split_rows
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
    return parse_dataset_specs(path, c.format, c.columns, c.split, c.revision, c.subset, c.text_unit)


def _prepare_all(data_config: DataConfig, tokenizer: Any) -> list[PreparedTable]:
    """Prepare the tables of all parts; that of a validation file is the last."""
    parts = _parse_specs(data_config, data_config.path)
    if isinstance(data_config.validation, str):
        validation = data_config.validation
        parts += held_out_specs(validation, parts, _parse_specs(data_config, validation))
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
    first = [row for table in concerned for row in first_refused(table.refused_file, NAMED_REFUSED, on_too_long)]
    shown = first[:NAMED_REFUSED]
    files = ", ".join(str(table.refused_file) for table in concerned)
    raise DataError(
        "data.max_refused",
        value=limit,
        reason=f"{refused:,} of {rows:,} rows cannot be used: {summarize_rows(shown)}"
        f"{'; …' if refused > NAMED_REFUSED else ''} (all of them are in {files})",
        hint=f"{summarize_hints(shown) or 'fix them'}; or data.max_refused={refused} to train without them",
    )


def _split(config: TrainConfig, tokenizer: Any, tables: Sequence[PreparedTable], must_train: bool) -> Data:
    """Mix the tables' rows, split them into training and held-out rows, and check them."""
    data_config, seed = config.data, config.run.seed
    parts = _parse_specs(data_config, data_config.path)
    mixture = concatenate_tables(tables[: len(parts)])
    found = [*(finding for table in tables for finding in table.findings), *check_splits(tables)]
    if isinstance(data_config.validation, str):
        held_out = concatenate_tables(tables[len(parts) :])
        train_rows, validation = np.arange(len(mixture)), Rows(held_out, np.arange(len(held_out)))
    else:
        groups = mixture.hashes[2] if data_config.group_by else join_groups(mixture.hashes[0], mixture.hashes[2])
        train_rows, validation = _hold_out(mixture, groups, data_config.validation, seed, must_train)
        wanted = count_wanted(data_config.validation, len(mixture))
        found += checks.check_held_out(len(validation), wanted, data_config.validation, data_config.group_by, groups)
    train_rows = mix_rows(train_rows, mixture.starts, parts, seed)
    train = Rows(mixture, limit_rows(train_rows, data_config.max_rows, seed))
    if data_config.group_by != BY_ROW:
        prompts_and_groups = [0, 2]
        trained, held = (rows.tables.hashes[prompts_and_groups][:, rows.indices] for rows in (train, validation))
        found += checks.check_leakage(trained, held, validation.row_name)
    found += checks.check_mixture(mixture.hashes[1], mixture.starts, mixture.row_name)
    found += checks.check_row_count(len(train))
    template = Template.from_config(tokenizer, data_config)
    found += checks.check_begin_token(template, data_config.control_tokens == "parse", len(mixture))
    found += check_template_kwargs(template.unread_kwargs())
    ends, opening = _end_ids(data_config, template, tables), tuple(template.opening_ids())
    return Data(train, validation, _hash(train, validation), ends, tuple(tables), tuple(found), opening)


def _hold_out(
    mixture: ConcatenatedTables, groups: np.ndarray, validation: int | float, seed: int, must_train: bool
) -> tuple[np.ndarray, Rows]:
    """Split a mixture's rows into those to train on and those held out; none where none would be left to train on,
    unless ``must_train``."""
    try:
        train_rows, held_out = split_rows(groups, validation, seed)
    except DataError:
        if must_train:
            raise
        train_rows, held_out = np.arange(len(mixture)), np.arange(0)
    return train_rows, Rows(mixture, held_out)


def _end_ids(data_config: DataConfig, template: Template, tables: Sequence[PreparedTable]) -> tuple[int, ...]:
    """Return the tokens that end an answer, as the template writes them, and a text."""
    formats = {table.format for table in tables}
    of_rendered = RenderedRows(template).end_ids if data_config.control_tokens == "parse" else []
    of_answers = template.end_ids() if formats - {"text"} else []
    of_texts = [int(template.tokenizer.eos_token_id)] if "text" in formats else []
    return tuple(dict.fromkeys([*of_answers, *of_rendered, *of_texts]))


def _hash(train: Rows, validation: Rows) -> str:
    digest = hashlib.sha256()
    for rows in (train, validation):
        digest.update("".join(p.fingerprint for p in rows.tables.parts).encode() + rows.indices.tobytes())
    return digest.hexdigest()[:32]
