"""The examples of a run: training rows and held-out rows, ready to be cut into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config.dataset_spec import DatasetSpec, parse_dataset_specs
from trainer.config.schema import BatchConfig, TrainConfig
from trainer.data.batching.global_batch import total_steps
from trainer.data.batching.micro_batch import Tokens
from trainer.data.mixture import Joined, at_most, join, mix
from trainer.data.prepare import checks
from trainer.data.prepare.checks import Finding
from trainer.data.prepare.prepare import Prepared, default_cache, first_refused, prepare
from trainer.data.split import split_rows
from trainer.data.templates.template import Template
from trainer.errors import DataError

NAMED_FILES = 3
NAMED_REFUSED = 3


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of prepared tables, numbered from 0.

    Attributes:
        tables: one or more, read as one.
        indices: which of their rows, int64; one that a mixture uses several times stands in it several times.
    """

    tables: Joined
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens an example, int32, shape (rows,)."""
        return self.tables.lengths[self.indices]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the last answer, int32, shape (rows,); 0 for plain text."""
        return self.tables.table.data.column("prompt_length").to_numpy()[self.indices]

    def texts(self, column: str) -> list[str]:
        """Each row's ``answer``, or ``choices`` (letters of its options; empty where it is no multiple choice)."""
        return [str(text) for text in self.tables.table.data.column(column).take(pa.array(self.indices)).to_pylist()]

    def label_tokens(self, which: np.ndarray) -> int:
        """Labels of some rows that enter the loss."""
        return int(self.tables.label_counts[self.indices[which]].sum())

    def examples(self, which: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The records of some rows, in the order asked for."""
        if not len(which):
            return []
        columns = self.tables.table[[int(self.indices[i]) for i in which]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def tokens(self, which: Sequence[int] | np.ndarray) -> list[Tokens]:
        """Token ids and labels of some rows, in the order asked for, without a Python object a token."""
        wanted = [int(self.indices[i]) for i in which]
        if not wanted:
            return []
        table = self.tables.table.with_format("arrow")[wanted]
        ids, loss_mask = (table.column(name).combine_chunks() for name in ("input_ids", "labels"))
        ends = ids.offsets.to_numpy()[1:-1] - ids.offsets[0].as_py()
        flat_ids = ids.flatten().to_numpy()
        flat_labels = loss_mask.flatten().to_numpy(zero_copy_only=False)
        return [Tokens(*pair) for pair in zip(np.split(flat_ids, ends), np.split(flat_labels, ends), strict=True)]

    def names(self, which: Sequence[int] | np.ndarray) -> list[str]:
        """``file:line`` of some rows."""
        return [self.tables.row_name(int(self.indices[i])) for i in which]


@dataclass(frozen=True, slots=True)
class Data:
    """What a run trains on and is scored on.

    Attributes:
        train: training rows.
        validation: held-out rows; empty when none are held out.
        fingerprint: digest of all tables and of the split; a resumed run must find the same.
        end_ids: token ids that end an answer, as the template writes them.
        parts: the tables, in the order of ``data.path``; a validation file's comes last.
        findings: what was found in them, and between them.
    """

    train: Rows
    validation: Rows
    fingerprint: str
    end_ids: tuple[int, ...]
    parts: tuple[Prepared, ...]
    findings: tuple[Finding, ...]

    def total_steps(self, batch: BatchConfig) -> int:
        """Updates of the whole run."""
        return total_steps(len(self.train), batch.global_size, batch.epochs, batch.max_steps)


def load_data(config: TrainConfig, tokenizer: Any, say: Callable[[str], None]) -> Data:
    """Prepare (or find) the tables and split them. Needs no process group; every rank gets the same.

    Raises:
        DataError: a source cannot be used, more rows are refused than ``data.max_refused`` allows, or there are fewer
            training rows than ``batch.global_size``.
    """
    tables = _prepare_all(config, tokenizer, say)
    _check_refused(config, tables)
    data = _split(config, tokenizer, tables, must_train=True)
    if config.batch.global_size > len(data.train):
        raise DataError(
            "batch.global_size",
            value=config.batch.global_size,
            reason=f"is more than the {len(data.train)} training rows",
            hint=f"batch.global_size={len(data.train)} or less",
        )
    return data


def inspect_data(config: TrainConfig, tokenizer: Any, say: Callable[[str], None]) -> Data:
    """As :func:`load_data`, for looking at data that may not be good enough to train on: neither refused rows nor too
    few rows are an error.

    Raises:
        DataError: a source cannot be used, or holds no usable row.
    """
    return _split(config, tokenizer, _prepare_all(config, tokenizer, say), must_train=False)


def describe(data: Data, config: TrainConfig) -> list[str]:
    """A short report for people: rows, lengths, what is learnt, what was left out, steps, warnings."""
    lengths = data.train.lengths
    learnt = data.train.label_tokens(np.arange(len(data.train)))
    steps = data.total_steps(config.batch)
    quantiles = " ".join(f"{q:.0f}" for q in np.quantile(lengths, (0, 0.5, 0.95, 1)))
    lines = [
        f"data: {len(data.train):,} rows to train on, {len(data.validation):,} held out, from {_files(data)}",
        f"tokens: {int(lengths.sum()):,}; a row min/median/95 %/max {quantiles}; {learnt:,} are learnt",
        f"steps: {steps:,} of {config.batch.global_size} examples",
    ]
    dropped, truncated, refused = (sum(getattr(p, n) for p in data.parts) for n in ("dropped", "truncated", "refused"))
    if dropped or truncated:
        lines.append(
            f"over data.max_length={config.data.max_length}: {dropped:,} rows left out, {truncated:,} rows cut to fit"
        )
    if refused:
        files = ", ".join(str(p.refused_file) for p in data.parts if p.refused)
        lines.append(f"refused: {refused:,} rows that cannot be used, see {files}")
    for finding in data.findings:
        if finding.level == "warning":
            lines.append(f"warning: {finding.message}" + (f" ({', '.join(finding.where)})" if finding.where else ""))
    return lines


def _parts(config: TrainConfig) -> list[DatasetSpec]:
    keys = config.data
    return parse_dataset_specs(keys.path, keys.format, keys.columns, keys.split, keys.revision, keys.subset)


def _prepare_all(config: TrainConfig, tokenizer: Any, say: Callable[[str], None]) -> list[Prepared]:
    """The tables of all parts; that of a validation file is the last."""
    keys = config.data
    parts = _parts(config)
    if isinstance(keys.validation, str):
        parts += parse_dataset_specs(keys.validation, keys.format, keys.columns, keys.split, keys.revision, keys.subset)
    cache = Path(keys.cache_dir).expanduser() if keys.cache_dir else default_cache()
    return [prepare(part, keys, tokenizer, cache, say) for part in parts]


def _check_refused(config: TrainConfig, tables: Sequence[Prepared]) -> None:
    keys = config.data
    refused = sum(table.refused for table in tables)
    rows = sum(len(table) + table.refused + table.dropped for table in tables)
    allowed = keys.max_refused * rows if isinstance(keys.max_refused, float) else keys.max_refused
    if refused <= allowed:
        return
    concerned = [table for table in tables if table.refused]
    first = [line for table in concerned for line in first_refused(table, NAMED_REFUSED, keys.on_too_long)]
    files = ", ".join(str(table.refused_file) for table in concerned)
    too_long = any(f.kind == "too_long" and f.level == "refused" for table in concerned for f in table.findings)
    raise DataError(
        "data.max_refused",
        value=keys.max_refused,
        reason=f"{refused:,} of {rows:,} rows cannot be used: {'; '.join(first[:NAMED_REFUSED])}"
        f"{'; …' if refused > NAMED_REFUSED else ''} (all of them are in {files})",
        hint=f"mend them, or data.max_refused={refused} to train without them"
        + (", or for the too long ones data.max_length or data.on_too_long=drop" if too_long else ""),
    )


def _split(config: TrainConfig, tokenizer: Any, tables: Sequence[Prepared], must_train: bool) -> Data:
    keys, seed = config.data, config.run.seed
    parts = _parts(config)
    joined = join(tables[: len(parts)])
    found = [finding for table in tables for finding in table.findings]
    if isinstance(keys.validation, str):
        held = join(tables[len(parts) :])
        train_rows, validation = np.arange(len(joined)), Rows(held, np.arange(len(held)))
    else:
        try:
            train_rows, held_rows = split_rows(joined.keys[0], keys.validation, seed)
        except DataError:
            if must_train:
                raise
            train_rows, held_rows = np.arange(len(joined)), np.arange(0)
        validation = Rows(joined, held_rows)
    train = Rows(joined, at_most(mix(train_rows, joined.begins, parts, seed), keys.max_rows, seed))
    if validation.tables is not joined:
        found += checks.leak(joined.keys[0][train.indices], validation.tables.keys[0], validation.tables.row_name)
    found += checks.across_parts(joined.keys[1], joined.begins, joined.row_name) + checks.few_rows(len(train))
    digest = hashlib.sha256()
    for rows in (train, validation):
        digest.update("".join(p.fingerprint for p in rows.tables.parts).encode() + rows.indices.tobytes())
    ends = Template(tokenizer, keys.template, keys.alpaca_role, keys.train_on).end_ids()
    return Data(train, validation, digest.hexdigest()[:32], tuple(ends), tuple(tables), tuple(found))


def _files(data: Data) -> str:
    names = [name for part in data.train.tables.parts for name in part.names]
    return ", ".join(names[:NAMED_FILES]) + (
        f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    )
