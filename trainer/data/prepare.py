"""Tokens on disk: built once, found again by fingerprint, memory-mapped.

Every process may call :func:`prepare` at the same moment. The first takes a file lock and builds in a sibling folder,
renamed into place with its marker inside; the others wait for the lock and find it done. So no process group need
exist yet, no collective can time out, and a kill leaves the old table or none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter

from trainer.config.schema import DataConfig
from trainer.data.formats import alpaca, recognise
from trainer.data.sources import open_bytes, read_rows
from trainer.data.templates import Encoded, Template
from trainer.errors import DataError

VERSION = 2  # of the table's layout and of everything that turns text into tokens: raise it when either changes
FEATURES = Features(
    {
        "line": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("bool")),
        "prompt_length": Value("int32"),
        "prompt_key": Value("int64"),
        "answer": Value("string"),
    }
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table of tokenised examples.

    Attributes:
        table: memory-mapped columns ``line`` (in the source, from 1), ``input_ids``, ``labels`` (which ids are learnt),
            ``prompt_length``, ``prompt_key`` (a hash of the ids of the uncut prompt), ``answer`` (the text).
        lengths: tokens an example, int32.
        label_counts: labels an example that enter the loss, int32.
        fingerprint: hex digest of the source's bytes, the tokenizer and every key that matters.
        dropped: examples left out for their length.
        truncated: examples whose prompt was cut.
        source: name of the file.
    """

    table: Dataset
    lengths: np.ndarray
    label_counts: np.ndarray
    fingerprint: str
    dropped: int
    truncated: int
    source: str

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def name_of(self) -> Callable[[int], str]:
        """``row index -> "file:line"``, for messages."""
        return lambda index: f"{self.source}:{self.table[int(index)]['line']}"


def prepare(path: Path, data: DataConfig, tokenizer: Any, cache: Path, say: Callable[[str], None]) -> Prepared:
    """The prepared table of one file, built if it is not there.

    Args:
        path: a JSONL file.
        data: the ``data`` group.
        tokenizer: the model's tokenizer.
        cache: folder of prepared tables.
        say: told what is being done, by the one process that does it.

    Raises:
        DataError: a row is refused, or is longer than ``data.max_length`` under ``on_too_long=error``.
    """
    template = Template(tokenizer, data.template, data.alpaca_role, data.train_on)
    fingerprint = _fingerprint(path, data, template)
    folder = cache / fingerprint
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{fingerprint}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "COMPLETE").exists():
            say(f"preparing {path.name}")
            partial = folder.with_name(f"{folder.name}.partial")
            try:
                _build(path, data, template, partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    facts = json.loads((folder / "COMPLETE").read_text())
    table = Dataset.from_file(str(folder / "rows.arrow"))
    lengths, label_counts = np.load(folder / "counts.npy", mmap_mode="r")
    return Prepared(table, lengths, label_counts, fingerprint, facts["dropped"], facts["truncated"], path.name)


def default_cache() -> Path:
    """``$AFINA_CACHE``, else the user's cache folder; prepared tables live in ``data`` below it."""
    base = os.environ.get("AFINA_CACHE")
    root = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afina"
    return root / "data"


def label_count(labels: Sequence[bool]) -> int:
    """Labels that enter the loss: all but one on the first token, which nothing predicts."""
    return sum(labels) - bool(labels[0])


def _fingerprint(path: Path, data: DataConfig, template: Template) -> str:
    digest = hashlib.sha256()
    with open_bytes(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    keys = [VERSION, data.format, data.max_length, data.on_too_long, template.describe()]
    tokenizer = template.tokenizer.backend_tokenizer.to_str()
    named = [template.tokenizer.bos_token, template.tokenizer.eos_token]  # chat templates write them by name
    digest.update(json.dumps([keys, tokenizer, named]).encode())
    return digest.hexdigest()[:32]


def _build(path: Path, data: DataConfig, template: Template, partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lengths: list[int] = []
    label_counts: list[int] = []
    counts = {"dropped": 0, "truncated": 0}
    writer = ArrowWriter(features=FEATURES, path=str(partial / "rows.arrow"), writer_batch_size=1000)
    with writer:
        for record in _records(path, data, template, counts):
            lengths.append(len(record["input_ids"]))
            label_counts.append(label_count(record["labels"]))
            writer.write(record)
        if lengths:
            writer.finalize()
    if not lengths:
        raise DataError("data.path", value=path, rule="holds no usable row", cure="see data.on_too_long and the file")
    np.save(partial / "counts.npy", np.asarray([lengths, label_counts], dtype=np.int32))
    (partial / "COMPLETE").write_text(json.dumps(counts))


def _records(path: Path, data: DataConfig, template: Template, counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    format_name: str | None = None
    for row in read_rows(path):
        format_name = format_name or recognise(row, data.format)
        example = alpaca(row)
        whole = template.encode(example)
        encoded = _fit(whole, data, row.where, counts)
        if encoded is not None:
            # of the whole prompt: cut to the room that its answer leaves, equal prompts would no longer be equal
            prompt = np.asarray(whole.ids[: whole.prompt_length], dtype=np.int32).tobytes()
            yield {
                "line": row.line,
                "input_ids": encoded.ids,
                "labels": encoded.labels,
                "prompt_length": encoded.prompt_length,
                "prompt_key": int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest(), "little", signed=True),
                "answer": example.output,
            }


def _fit(encoded: Encoded, data: DataConfig, where: str, counts: dict[str, int]) -> Encoded | None:
    """The example within ``data.max_length``, or ``None`` when it is left out.

    Raises:
        DataError: too long under ``error``; or ``truncate`` would have to cut into the answer.
    """
    excess = len(encoded.ids) - data.max_length
    if excess <= 0:
        return encoded
    if data.on_too_long == "drop":
        counts["dropped"] += 1
        return None
    if data.on_too_long == "error":
        raise DataError(
            where,
            rule=f"is {len(encoded.ids)} tokens long, over data.max_length={data.max_length}",
            cure="raise data.max_length, or data.on_too_long=drop or truncate",
        )
    if excess >= encoded.prompt_length:
        raise DataError(
            where,
            rule=f"has an answer of {len(encoded.ids) - encoded.prompt_length} tokens, which alone fills "
            f"data.max_length={data.max_length}: cutting it would teach a wrong ending",
            cure="raise data.max_length, or data.on_too_long=drop",
        )
    counts["truncated"] += 1
    return Encoded(encoded.ids[excess:], encoded.labels[excess:], encoded.prompt_length - excess)
