"""Prepare the token table of a data set: built once, cached on disk, found again by its fingerprint.

Every process may call :func:`prepare` at the same moment. The first takes a file lock and builds in a sibling folder,
renamed into place and then marked; the others wait for the lock and find it done. So no process group need
exist yet, no collective can time out, and a kill leaves the old table or none.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from trainer.config.dataset_spec import DatasetSpec
from trainer.config.schema import DataConfig
from trainer.data.formats.detect import detect_format
from trainer.data.prepare.build import build
from trainer.data.prepare.encode import EncodingSpec
from trainer.data.prepare.grouping import check_group_by
from trainer.data.prepare.table import MARKER, PreparedTable, open_table
from trainer.data.sources.open import Source, open_source
from trainer.data.sources.rows import Row, parse_rows
from trainer.data.templates.template import Template
from trainer.errors import DataError
from trainer.files import (
    cache_root,
    commit_folder,
    file_manifest,
    find_change,
    lock,
    parse_json,
    partial_folder,
    remove_stale_partials,
    warn_if_others_may_write,
)
from trainer.tracking.counter import ProgressCounter

logger = logging.getLogger(__name__)
VERSION = 9  # of everything that turns text into tokens: raise it when that changes; no older run resumes then
LAYOUT = 4  # of the table's files and of what is found in the rows


def prepare(
    dataset: DatasetSpec,
    data_config: DataConfig,
    tokenizer: Any,
    cache: Path,
) -> PreparedTable:
    """Return the prepared table of one data set, built if it is not in the cache.

    Args:
        dataset: which rows; its weight and number of rows change nothing here.
        data_config: the ``data`` section.
        tokenizer: the model's tokenizer.
        cache: folder of prepared tables.

    Raises:
        DataError: the source, the template or the cache cannot be used, or not one row can.
    """
    source = open_source(dataset)
    template = Template.from_config(tokenizer, data_config)
    fingerprint = _fingerprint(source, data_config, template, cache / "digests.json")
    folder = cache / _table_name(fingerprint, data_config)
    with _lock_table(cache, folder.name):
        if not _is_whole(folder):
            _build(source, data_config, tokenizer, folder)
    return open_table(folder, source, fingerprint)


def _is_whole(folder: Path) -> bool:
    """Return whether a table is complete and, compared once after each change of its files, what was written."""
    try:
        made = parse_json((folder / MARKER).read_text())
        damage = find_change(folder, made.get("files", {}), folder.with_name(f".{folder.name}.compared"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        damage = f"{folder} has no readable marker"
    if damage is not None:
        logger.warning(f"{damage}; these rows are prepared again")
    return damage is None


def default_cache() -> Path:
    """Return the folder of prepared tables where `data.cache_dir` names none."""
    return cache_root() / "data"


def _fingerprint(source: Source, data_config: DataConfig, template: Template, known_hashes: Path) -> str:
    """Hash everything that the tokens depend on: source, config, template, tokenizer."""
    dataset, tokenizer = source.spec, template.tokenizer
    lengths = (data_config.max_length, data_config.on_too_long)
    encoding = [VERSION, dataset.format, sorted(dataset.columns.items()), *lengths, template.describe()]
    if data_config.control_tokens != "text":
        encoding.append(data_config.control_tokens)
    named = [tokenizer.bos_token, tokenizer.eos_token]  # chat templates write them by name
    digest = hashlib.sha256(source.digest(known_hashes).encode())
    digest.update(json.dumps([encoding, tokenizer.backend_tokenizer.to_str(), named]).encode())
    return digest.hexdigest()[:32]


def _table_name(fingerprint: str, data_config: DataConfig) -> str:
    """Name a table's folder: by its tokens, and by what else is kept in it, which changes no token."""
    kept = json.dumps([LAYOUT, data_config.group_by]).encode()
    return f"{fingerprint}-{hashlib.sha256(kept).hexdigest()[:8]}"


@contextmanager
def _lock_table(cache: Path, name: str) -> Iterator[None]:
    with ExitStack() as held:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            warn_if_others_may_write(cache)
            waited = ProgressCounter("another process is preparing these rows; waiting for it")
            with ExitStack() as waiting:
                held.enter_context(lock(cache / f"{name}.lock", lambda: waiting.enter_context(waited)))
        except OSError as error:
            raise _no_cache(cache, error) from error
        yield


def _no_cache(cache: Path, error: OSError) -> DataError:
    return DataError(
        "data.cache_dir", value=cache, reason=f"cannot be written ({error.strerror})", hint="data.cache_dir=FOLDER"
    )


def _build(source: Source, data_config: DataConfig, tokenizer: Any, folder: Path) -> None:
    """Build a table beside its place and rename it there. Called with its lock held."""
    remove_stale_partials(folder.parent)
    spec = EncodingSpec(
        tokenizer=tokenizer,
        format=_detect_format(source, data_config.group_by),
        columns=source.spec.columns,
        template=data_config.template,
        alpaca_role=data_config.alpaca_role,
        train_on=data_config.train_on,
        template_kwargs=data_config.template_kwargs,
        max_length=data_config.max_length,
        on_too_long=data_config.on_too_long,
        group_by=data_config.group_by,
        control_tokens=data_config.control_tokens,
    )
    try:
        with partial_folder(folder) as partial:
            made = build(source, spec, data_config.workers, partial)
            commit_folder(partial, folder, MARKER, json.dumps({**made, "files": file_manifest(partial)}))
    except OSError as error:
        raise _no_cache(folder.parent, error) from error


def _detect_format(source: Source, group_by: str | None) -> str:
    """Detect the format of a data set: that of its first usable row, decided once, before any process starts.

    Raises:
        DataError: it is not known, or that row has no column ``group_by``.
    """
    dataset, unknown = source.spec, None
    for chunk in source.chunks():
        for row in parse_rows(chunk):
            if not isinstance(row, Row):
                continue
            check_group_by(row, group_by)
            try:
                return detect_format(row, dataset.format, dataset.columns)
            except DataError as error:
                unknown = unknown or error
        if unknown is not None:
            raise unknown
    return dataset.format
