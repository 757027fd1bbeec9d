"""Open a data source: find the files that a data set names, hash them, and read chunks of their rows in order."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.compat.datasets import table_fingerprint
from trainer.config.dataset_spec import DatasetSpec, is_glob, is_hub_id
from trainer.data.sources import hf_datasets
from trainer.data.sources.file_hashes import hash_files
from trainer.data.sources.readers import KNOWN, PLAIN_TEXT, detect_kind, read_chunks
from trainer.data.sources.rows import Chunk
from trainer.data.sources.splits import LeftAlone, choose_split, name_splits
from trainer.errors import DataError

METADATA_FILES = ("dataset_info.json", "dataset_infos.json")
"""What lies beside downloaded data sets and holds no rows."""


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one data set, in a fixed order.

    Attributes:
        spec: what was asked for.
        files: their absolute paths; of a data set that ``datasets`` keeps, the files that it keeps it in.
        names: what they are called in messages: the file's name, below a folder or glob its path from there; a data
            set that ``datasets`` keeps has one name.
        table: that data set.
        left_alone: what lies beside the files, and belongs to other splits.
    """

    spec: DatasetSpec
    files: tuple[Path, ...]
    names: tuple[str, ...]
    table: Any = field(default=None, repr=False)
    left_alone: tuple[LeftAlone, ...] = ()

    @property
    def has_text_files(self) -> bool:
        """Whether there are files of plain text, whose rows ``data.text_unit`` makes."""
        return self.table is None and any(detect_kind(file) in PLAIN_TEXT for file in self.files)

    def digest(self, known_hashes: Path | None = None) -> str:
        """Hash everything that the rows depend on, as hex: the bytes of the files, or the hub data set's fingerprint.

        Args:
            known_hashes: a JSON file that keeps the hashes of unchanged files, see ``file_hashes``.

        Raises:
            DataError: a file cannot be read.
        """
        spec = self.spec
        identity: list[Any] = [self.names, sorted(spec.columns.items()), spec.format, spec.split]
        if self.has_text_files and spec.text_unit != "line":
            identity.append(spec.text_unit)
        if self.files:
            identity.append(hash_files(self.files, known_hashes))
        else:
            identity += [spec.revision, table_fingerprint(self.table)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def chunks(self) -> Iterator[Chunk]:
        """Read the rows of all files, in order.

        Raises:
            DataError: a file cannot be opened or is not of its kind.
        """
        if self.table is not None:
            yield from hf_datasets.read_chunks(self.table, self.names[0])
            return
        for number, (path, name) in enumerate(zip(self.files, self.names, strict=True)):
            yield from read_chunks(path, number, name, self.spec.text_unit)


def open_source(spec: DatasetSpec) -> Source:
    """Find the files of a data set: of a folder or glob those of ``spec.split``.

    Raises:
        DataError: there are none, or their kind is unknown.
    """
    given = Path(os.path.abspath(Path(spec.path).expanduser()))
    if given.is_dir() and hf_datasets.is_saved(given):
        table = hf_datasets.load_saved(given, spec)
        shards = tuple(Path(shard["filename"]) for shard in table.cache_files)
        split = f"/{spec.split}" if (given / "dataset_dict.json").is_file() else ""
        return Source(spec, shards, (f"{given.name}{split}",), table, hf_datasets.other_splits(given, spec))
    if given.is_dir():
        return _choose_files(spec, _files_below(given, spec), given)
    if given.exists():
        return _source(spec, [given], given.parent)
    if is_glob(spec.path):
        return _choose_files(spec, _glob_files(given, spec), _fixed_folder(given))
    if is_hub_id(spec.path):
        return Source(spec, (), (f"{spec.path}/{spec.split}",), hf_datasets.load_hub(spec))
    raise DataError("data.path", value=spec.path, reason="there is no such file", hint="data.path=PATH/TO/FILE.jsonl")


def list_splits(spec: DatasetSpec) -> list[str]:
    """List the splits of a folder, ``""`` among them where files name none.

    Raises:
        DataError: the folder holds no data.
    """
    folder = Path(os.path.abspath(Path(spec.path).expanduser()))
    if hf_datasets.is_saved(folder):
        return [left.split for left in hf_datasets.other_splits(folder, replace(spec, split=""))]
    return sorted(set(name_splits([file.relative_to(folder).as_posix() for file in _files_below(folder, spec)])))


def _choose_files(spec: DatasetSpec, files: list[Path], above: Path) -> Source:
    names = [file.relative_to(above).as_posix() for file in files]
    chosen, left_alone = choose_split(files, names, spec.split, spec.path, is_glob(spec.path))
    return _source(spec, [files[i] for i in chosen], above, tuple(left_alone))


def _source(spec: DatasetSpec, files: list[Path], above: Path, left_alone: tuple[LeftAlone, ...] = ()) -> Source:
    for file in files:
        if detect_kind(file) is None:
            raise DataError("data.path", value=file, reason="is of no known kind", hint=f"known are {KNOWN}")
    names = tuple(file.relative_to(above).as_posix() for file in files)
    return Source(spec, tuple(files), names, left_alone=left_alone)


def _files_below(folder: Path, spec: DatasetSpec) -> list[Path]:
    """Find the files of known kinds below a folder, sorted by their path from it; hidden ones are skipped."""
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
            (known if detect_kind(file) and file.name not in METADATA_FILES and file.is_file() else other).append(file)
    if not known:
        found = f"holds no data: {', '.join(sorted(file.name for file in other)[:3])} …" if other else "is empty"
        raise DataError("data.path", value=spec.path, reason=f"the folder {found}", hint=f"known are {KNOWN}")
    return sorted(known, key=lambda file: file.relative_to(folder).as_posix())


def _glob_files(pattern: Path, spec: DatasetSpec) -> list[Path]:
    found = sorted(Path(name) for name in set(glob.glob(str(pattern), recursive=True)))
    files = [path for path in found if path.is_file()]
    if not files:
        reason, hint = ("matches folders only", f"{spec.path}/*.jsonl") if found else ("matches no file", "PATTERN")
        raise DataError("data.path", value=spec.path, reason=reason, hint=f"data.path='{hint}'")
    return files


def _fixed_folder(pattern: Path) -> Path:
    """Return the folder above a pattern's first wildcard."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if is_glob(part))
    return Path(*parts[:first])
