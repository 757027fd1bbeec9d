"""Tokens on disk: built once, found again by fingerprint, memory-mapped.

Every process may call :func:`prepare` at the same moment. The first takes a file lock and builds in a sibling folder,
renamed into place and then marked; the others wait for the lock and find it done. So no process group need
exist yet, no collective can time out, and a kill leaves the old table or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from trainer.config.dataset_spec import DatasetSpec
from trainer.config.schema import DataConfig
from trainer.data.formats.formats import recognise
from trainer.data.prepare.build import REFUSED_FILE, TABLE_FILE, build
from trainer.data.prepare.checks import Finding
from trainer.data.prepare.encode import EncodingSpec
from trainer.data.sources.open import Source, open_source
from trainer.data.sources.rows import Row, parse_rows
from trainer.data.templates.template import Template
from trainer.errors import DataError
from trainer.files import cache_root, commit_folder, lock, partial_folder, remove_stale_partials

VERSION = 6  # of the table's layout and of everything that turns text into tokens: raise it when either changes
MARKER = "COMPLETE"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table of tokenised examples: what became of one part of the data.

    Attributes:
        table: memory-mapped columns ``file`` (which of ``names``), ``line`` (in it, from 1), ``input_ids``, ``labels``
            (which ids are learnt), ``prompt_length``, ``answer`` (the text).
        lengths: tokens an example, int32, shape (rows,).
        label_counts: labels an example that enter the loss, int32, shape (rows,).
        keys: hashes of the ids of each row's uncut opening, and of all its uncut ids; int64, shape (2, rows).
        fingerprint: hex digest of the source, the tokenizer and every key that matters.
        names: the files, as they are called in messages.
        folder: where the table is; ``refused.jsonl`` in it holds every row that is not in the table.
        refused: rows that cannot be used.
        dropped: rows left out for their length.
        truncated: rows that were cut.
        format: the rows' format, recognised.
        findings: what was found in the rows.
    """

    table: Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    keys: np.ndarray
    fingerprint: str
    names: tuple[str, ...]
    folder: Path
    refused: int
    dropped: int
    truncated: int
    format: str
    findings: tuple[Finding, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def refused_file(self) -> Path:
        """Every row that is not in the table, one JSON object a line: ``where``, ``reason``, ``message``, ``raw``."""
        return self.folder / REFUSED_FILE

    def row_name(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        record = self.table[int(row)]
        return f"{self.names[record['file']]}:{record['line']}"


def prepare(
    part: DatasetSpec, data: DataConfig, tokenizer: Any, cache: Path, say: Callable[[str], None] = lambda _: None
) -> Prepared:
    """The prepared table of one part, built if it is not there.

    Args:
        part: which rows; its weight and number of rows change nothing here.
        data: the ``data`` group.
        tokenizer: the model's tokenizer.
        cache: folder of prepared tables.
        say: told what is being done, by the one process that does it.

    Raises:
        DataError: the source, the template or the cache cannot be used, or not one row can.
    """
    source = open_source(part)
    template = Template(tokenizer, data.template, data.alpaca_role, data.train_on)
    fingerprint = _fingerprint(source, data, template, cache / "digests.json")
    folder = cache / fingerprint
    with _lock_table(cache, fingerprint):
        if not (folder / MARKER).exists():
            _build(source, data, tokenizer, folder, say)
    return _open(folder, source)


def default_cache() -> Path:
    """Return the folder of prepared tables where `data.cache_dir` names none."""
    return cache_root() / "data"


def first_refused(prepared: Prepared, most: int, on_too_long: str) -> list[str]:
    """The first few rows that count as refused: ``file:line``, what is wrong and the reason's word."""
    out: list[str] = []
    with prepared.refused_file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(out) == most:
                break
            if on_too_long != "drop" or row["reason"] != "too_long":
                out.append(_told(row))
    return out


def _told(row: dict[str, str]) -> str:
    return f"{row['where']} {row['message'].split(' → ')[0]} ({row['reason']})"


def _fingerprint(source: Source, data: DataConfig, template: Template, memory: Path) -> str:
    part, tokenizer = source.part, template.tokenizer
    keys = [VERSION, part.format, sorted(part.columns.items()), data.max_length, data.on_too_long, template.describe()]
    named = [tokenizer.bos_token, tokenizer.eos_token]  # chat templates write them by name
    digest = hashlib.sha256(source.digest(memory).encode())
    digest.update(json.dumps([keys, tokenizer.backend_tokenizer.to_str(), named]).encode())
    return digest.hexdigest()[:32]


@contextmanager
def _lock_table(cache: Path, fingerprint: str) -> Iterator[None]:
    with ExitStack() as held:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(cache / f"{fingerprint}.lock"))
        except OSError as error:
            raise _no_cache(cache, error) from error
        yield


def _no_cache(cache: Path, error: OSError) -> DataError:
    return DataError(
        "data.cache_dir", value=cache, reason=f"cannot be written ({error.strerror})", hint="data.cache_dir=FOLDER"
    )


def _build(source: Source, data: DataConfig, tokenizer: Any, folder: Path, say: Callable[[str], None]) -> None:
    """Build a table beside its place and rename it there. Called with its lock held."""
    remove_stale_partials(folder.parent)
    part = source.part
    recipe = EncodingSpec(
        *(tokenizer, _recognised(source), part.columns, data.template, data.alpaca_role, data.train_on),
        *(data.max_length, data.on_too_long),
    )
    try:
        with partial_folder(folder) as partial:
            facts = build(source, recipe, data.workers, partial, say)
            commit_folder(partial, folder, MARKER, json.dumps(facts))
    except OSError as error:
        raise _no_cache(folder.parent, error) from error


def _recognised(source: Source) -> str:
    """The format of a part: that of its first usable row, decided once, before any process starts."""
    part, unknown = source.part, None
    for chunk in source.chunks():
        for row in parse_rows(chunk):
            if not isinstance(row, Row):
                continue
            try:
                return recognise(row, part.format, part.columns)
            except DataError as error:
                unknown = unknown or error
        if unknown is not None:
            raise unknown
    return part.format


def _open(folder: Path, source: Source) -> Prepared:
    facts = json.loads((folder / MARKER).read_text())
    if not facts["rows"]:
        with (folder / REFUSED_FILE).open(encoding="utf-8") as lines:
            first = [_told(json.loads(line)) for line, _ in zip(lines, range(3))]
        why = f": {'; '.join(first)}; all of them are in {folder / REFUSED_FILE}" if first else ", it is empty"
        raise DataError("data.path", value=source.part.path, reason=f"holds no usable row{why}", hint="mend the rows")
    table = Dataset.from_file(str(folder / TABLE_FILE))
    lengths, label_counts = np.load(folder / "counts.npy", mmap_mode="r")
    keys = np.load(folder / "keys.npy", mmap_mode="r")
    findings = tuple(Finding(**{**found, "where": tuple(found["where"])}) for found in facts["findings"])
    numbers = (facts["refused"], facts["dropped"], facts["truncated"], facts["format"])
    return Prepared(table, lengths, label_counts, keys, folder.name, source.names, folder, *numbers, findings)
