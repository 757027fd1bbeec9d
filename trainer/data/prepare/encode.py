"""Encode chunks of rows into columns of token ids and loss masks: what a worker process does, or the only process.

What is imported here is paid for by every worker: no torch, and not ``datasets``, which brings pandas along.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Example
from trainer.data.sources.rows import Chunk, RejectedRow, Row, RowError, parse_rows, raw_text
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.template import Template

NO_END, DOUBLE_BOS, TRUNCATED, ASKED_OTHERWISE, THINKS = 1, 2, 4, 8, 16  # bits of ROW_STATS["flags"]
MOST = 65535  # that a count in ROW_STATS can hold
SCHEMA = pa.schema(
    {
        "file": pa.int32(),
        "line": pa.int64(),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.bool_()),
        "prompt_length": pa.int32(),
        "answer": pa.string(),
        "choices": pa.string(),
    }
)
# What is kept in memory of each row while a table is built, beside the table itself: 61 bytes.
ROW_STATS = np.dtype(
    [
        ("file", np.int32),
        ("line", np.int64),
        ("length", np.int32),
        ("label_count", np.int32),
        ("answer_length", np.int32),
        ("prefix_hash", np.int64),
        ("row_hash", np.int64),
        ("reply_hash", np.int64),
        ("text_hash", np.int64),
        ("flags", np.uint8),
        ("unended", np.uint16),
        ("lost_thoughts", np.uint16),
    ]
)


@dataclass(frozen=True, slots=True)
class EncodingSpec:
    """All that the encoding of rows depends on; picklable.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        format: of the rows, never ``auto``.
        columns: our field names -> the rows'.
        template, alpaca_role, train_on, max_length, on_too_long, template_kwargs: of the ``data`` group.
    """

    tokenizer: Any
    format: str
    columns: Mapping[str, str]
    template: str
    alpaca_role: str
    train_on: str
    max_length: int
    on_too_long: str
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as tokens.

    Attributes:
        rows: a serialised Arrow record batch of ``SCHEMA``; empty when no row was usable.
        stats: of the same rows, dtype ``ROW_STATS``, shape (rows,).
        rejected: the rows that are not among them.
    """

    rows: bytes
    stats: np.ndarray
    rejected: tuple[RejectedRow, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    stats: tuple[int, ...]
    ids: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int
    answer: str
    choices: str


class Encoder:
    """Encodes chunks by one specification.

    Raises:
        DataError: the template or the tokenizer cannot be used at all.
    """

    def __init__(self, spec: EncodingSpec) -> None:
        self.spec = spec
        named = (spec.template, spec.alpaca_role, spec.train_on, spec.template_kwargs)
        self.template = Template(spec.tokenizer, *named)
        self.end_ids = frozenset(self.template.end_ids())
        self.bos_id = spec.tokenizer.bos_token_id

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode or reject every row of a chunk, in its order."""
        records: list[_Record] = []
        rejected: list[RejectedRow] = []
        for row in parse_rows(chunk):
            if isinstance(row, RejectedRow):
                rejected.append(row)
                continue
            try:
                records.append(self._record(row))
            except RowError as error:
                message = str(error).removeprefix(row.where).lstrip(": ")
                rejected.append(RejectedRow(row.where, error.code, message, _raw(chunk, row)))
        stats = np.array([r.stats for r in records], dtype=ROW_STATS)
        return EncodedChunk(_serialize(records, stats), stats, tuple(rejected))

    def _record(self, row: Row) -> _Record:
        example = parse_example(row, self.spec.format, self.spec.columns)
        whole = self.template.encode(example)
        cut = fit_to_max_length(whole, self.spec, row.where, example.text is not None, self.template.bos_id)
        ids, loss_mask = np.asarray(cut.ids, dtype=np.int32), np.asarray(cut.loss_mask, dtype=np.bool_)
        label_count = int(loss_mask[1:].sum())  # nothing predicts the first token
        if not label_count:
            reason = "has no token in the loss" + (" once it is cut" if cut is not whole else "")
            raise RowError("empty_loss_mask", row.where, reason=reason, hint="leave the row out")
        # Hashes are of the uncut row: cut to the room that its answer leaves, equal prompts would no longer be equal.
        whole_ids = np.asarray(whole.ids, dtype=np.int32)
        stats = (
            *(example.file, example.line, len(ids), label_count, len(ids) - cut.prompt_length),
            *(_hash(whole_ids[: whole.prompt_prefix_length].tobytes()), _hash(whole_ids.tobytes())),
            *(_hash(_first_reply(example, whole)), _hash((example.text or example.answer).encode())),
            self._flags(ids, loss_mask, whole, cut is not whole, example),
            *(min(whole.unended, MOST), min(whole.lost_thoughts, MOST)),
        )
        return _Record(stats, ids, loss_mask, cut.prompt_length, example.answer, example.choices)

    def _flags(self, ids: np.ndarray, loss_mask: np.ndarray, whole: Encoded, truncated: bool, example: Example) -> int:
        flags = TRUNCATED if truncated else 0
        cut_at_its_end = truncated and example.text is not None
        last = int(ids[np.flatnonzero(loss_mask)[-1]])
        if not cut_at_its_end and last not in self.end_ids and not self.template.ends_turn(last):
            flags |= NO_END
        if whole.asked_otherwise:
            flags |= ASKED_OTHERWISE
        if whole.has_thoughts:
            flags |= THINKS
        if self.bos_id is not None and list(ids[:2]) == [self.bos_id] * 2:
            flags |= DOUBLE_BOS
        return flags


def fit_to_max_length(encoded: Encoded, spec: EncodingSpec, where: str, is_text: bool, bos_id: int | None) -> Encoded:
    """Cut an example to ``max_length``, as ``on_too_long`` says; the very same object when it is short enough.

    ``truncate`` cuts plain text at its end, and of a conversation the oldest tokens: never any of the last answer, and
    never a begin token that stands first.

    Raises:
        RowError: ``too_long``: it may not be cut, or what would be left teaches nothing.
    """
    limit, excess = spec.max_length, len(encoded.ids) - spec.max_length
    if excess <= 0:
        return encoded
    if spec.on_too_long != "truncate":
        raise RowError(
            "too_long",
            where,
            reason=f"is {len(encoded.ids)} tokens long, over data.max_length={limit}",
            hint="raise data.max_length, or data.on_too_long=drop or truncate",
        )
    if is_text:
        return Encoded(encoded.ids[:limit], encoded.loss_mask[:limit], 0, limit)
    if excess >= encoded.prompt_length:
        raise RowError(
            "too_long",
            where,
            reason=f"has an answer of {len(encoded.ids) - encoded.prompt_length} tokens, which alone fills "
            f"data.max_length={limit}: cutting it would teach a wrong ending",
            hint="raise data.max_length, or data.on_too_long=drop",
        )
    kept = 1 if encoded.ids[0] == bos_id else 0
    loss_mask = encoded.loss_mask[:kept] + encoded.loss_mask[kept + excess :]
    if not any(loss_mask[1:]):
        raise RowError(
            "too_long",
            where,
            reason=f"has no token left in the loss when it is cut to data.max_length={limit}",
            hint="raise data.max_length, or data.on_too_long=drop",
        )
    ids = encoded.ids[:kept] + encoded.ids[kept + excess :]
    return Encoded(ids, loss_mask, encoded.prompt_length - excess, max(kept, encoded.prompt_prefix_length - excess))


def _first_reply(example: Example, encoded: Encoded) -> bytes:
    """Return what the first turn in the loss says: not its tokens, since a template may end or open the last turn of a
    conversation otherwise."""
    if encoded.first_turn is None:
        return (example.text or "").encode()
    turn = example.turns[encoded.first_turn]
    extra = json.dumps(turn.extra, sort_keys=True, default=str) if turn.extra else ""
    return f"{turn.text.strip()}\0{extra}".encode()


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _raw(chunk: Chunk, row: Row) -> str:
    """Return the text of a row: its line as it stands in the file, else its fields."""
    place = row.line - chunk.line
    return raw_text(chunk.lines[place] if 0 <= place < len(chunk.lines) else row.fields)


def _serialize(records: Sequence[_Record], stats: np.ndarray) -> bytes:
    if not records:
        return b""
    offsets = _column(pa.int32(), _offsets(stats["length"]))
    ids, loss_mask = (np.concatenate([getattr(r, name) for r in records]) for name in ("ids", "loss_mask"))
    columns = [
        _column(pa.int32(), stats["file"]),
        _column(pa.int64(), stats["line"]),
        pa.ListArray.from_arrays(offsets, _column(pa.int32(), ids)),
        pa.ListArray.from_arrays(
            offsets, _column(pa.bool_(), np.packbits(loss_mask, bitorder="little"), len(loss_mask))
        ),
        _column(pa.int32(), np.asarray([record.prompt_length for record in records], dtype=np.int32)),
        _strings([record.answer for record in records]),
        _strings([record.choices for record in records]),
    ]
    return bytes(pa.RecordBatch.from_arrays(columns, schema=SCHEMA).serialize())


def _strings(texts: Sequence[str]) -> pa.Array:
    data = [text.encode() for text in texts]
    return pa.StringArray.from_buffers(
        len(data), pa.py_buffer(_offsets([len(d) for d in data])), pa.py_buffer(b"".join(data))
    )


def _column(kind: pa.DataType, values: np.ndarray, length: int | None = None) -> pa.Array:
    """Wrap bytes as an Arrow array. ``pa.array`` would do, but it imports pandas: 50 MB in every worker."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values) if length is None else length, [None, pa.py_buffer(values)])


def _offsets(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
