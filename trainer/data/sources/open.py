"""The rows of a part of the data: which files it means, what they depend on, and chunks of their rows, in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.dataset_spec import DatasetSpec, is_glob, is_hub_id
from trainer.data.sources import hf_datasets as hub
from trainer.data.sources.file_hashes import hash_files
from trainer.data.sources.readers import KNOWN, detect_kind, read
from trainer.data.sources.rows import CHUNK_LINES, Chunk, RejectedRow, Row, RowError, parse_rows, raw_text
from trainer.errors import DataError

__all__ = ["CHUNK_LINES", "Chunk", "RejectedRow", "Row", "RowError", "Source", "open_source", "parse_rows", "raw_text"]

ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")
"""What lies beside downloaded data sets and holds no rows."""


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one part, in a fixed order.

    Attributes:
        part: what was asked for.
        files: their absolute paths; of a data set that ``datasets`` keeps, the files that it keeps it in.
        names: what they are called in messages: the file's name, below a folder or glob its path from there; a data
            set that ``datasets`` keeps has one name.
        table: that data set.
    """

    part: DatasetSpec
    files: tuple[Path, ...]
    names: tuple[str, ...]
    table: Any = field(default=None, repr=False)

    def digest(self, memory: Path | None = None) -> str:
        """Hex digest of everything the rows depend on: the bytes of the files, or the hub data set's fingerprint.

        Args:
            memory: where the hashes of unchanged files are kept (JSON), see ``file_hashes``.

        Raises:
            DataError: a file cannot be read.
        """
        part = self.part
        facts: list[Any] = [self.names, sorted(part.columns.items()), part.format, part.split]
        if self.files:
            facts.append(hash_files(self.files, memory))
        else:
            facts += [part.revision, self.table._fingerprint]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        """The rows of all files, in order.

        Raises:
            DataError: a file cannot be opened or is not of its kind.
        """
        if self.table is not None:
            yield from hub.chunks(self.table, self.names[0])
            return
        for number, (path, name) in enumerate(zip(self.files, self.names, strict=True)):
            yield from read(path, number, name)


def open_source(part: DatasetSpec) -> Source:
    """Find the files of a part.

    Raises:
        DataError: there are none, or their kind is unknown.
    """
    given = Path(os.path.abspath(Path(part.path).expanduser()))
    if given.is_dir() and hub.is_saved(given):
        table = hub.load_saved(given, part)
        shards = tuple(Path(shard["filename"]) for shard in table.cache_files)
        split = f"/{part.split}" if (given / "dataset_dict.json").is_file() else ""
        return Source(part, shards, (f"{given.name}{split}",), table)
    if given.is_dir():
        return _source(part, _below(given, part), given)
    if given.exists():
        return _source(part, [given], given.parent)
    if is_glob(part.path):
        return _source(part, _matching(given, part), _fixed(given))
    if is_hub_id(part.path):
        return Source(part, (), (f"{part.path}/{part.split}",), hub.load_hub(part))
    raise DataError("data.path", value=part.path, reason="there is no such file", hint="data.path=PATH/TO/FILE.jsonl")


def _source(part: DatasetSpec, files: list[Path], above: Path) -> Source:
    for file in files:
        if detect_kind(file) is None:
            raise DataError("data.path", value=file, reason="is of no known kind", hint=f"known are {KNOWN}")
    return Source(part, tuple(files), tuple(file.relative_to(above).as_posix() for file in files))


def _below(folder: Path, part: DatasetSpec) -> list[Path]:
    """The files of known kinds below a folder, sorted by their path from it; hidden ones are passed over."""
    known: list[Path] = []
    other: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        shown = {
            name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders) if not name.startswith(".")
        }
        folders[:] = [name for name, real in shown.items() if real not in seen]  # a link may lead back up
        seen |= set(shown.values())
        for file in (Path(place, name) for name in names if not name.startswith(".")):
            (known if detect_kind(file) and file.name not in ABOUT_DATA and file.is_file() else other).append(file)
    if not known:
        found = f"holds no data: {', '.join(sorted(file.name for file in other)[:3])} …" if other else "is empty"
        raise DataError("data.path", value=part.path, reason=f"the folder {found}", hint=f"known are {KNOWN}")
    return sorted(known, key=lambda file: file.relative_to(folder).as_posix())


def _matching(pattern: Path, part: DatasetSpec) -> list[Path]:
    found = sorted(Path(name) for name in set(glob.glob(str(pattern), recursive=True)))
    files = [path for path in found if path.is_file()]
    if not files:
        reason, hint = ("matches folders only", f"{part.path}/*.jsonl") if found else ("matches no file", "PATTERN")
        raise DataError("data.path", value=part.path, reason=reason, hint=f"data.path='{hint}'")
    return files


def _fixed(pattern: Path) -> Path:
    """The folder above a pattern's first wildcard."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if is_glob(part))
    return Path(*parts[:first])
