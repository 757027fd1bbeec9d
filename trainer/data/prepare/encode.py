"""Chunks of rows into columns of tokens: the work of a worker process, and of the only process when there are none.

What is imported here is paid for by every worker: no torch, and not ``datasets``, which brings pandas along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.formats.formats import Example, parse_example
from trainer.data.sources.rows import Chunk, RejectedRow, Row, RowError, parse_rows, raw_text
from trainer.data.templates.template import Encoded, Template

NO_END, DOUBLE_BOS, TRUNCATED = 1, 2, 4  # bits of FACTS["flags"]
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
# What is remembered of each row while a table is built, beside the table itself: 57 bytes.
FACTS = np.dtype(
    [
        ("file", np.int32),
        ("line", np.int64),
        ("length", np.int32),
        ("label_count", np.int32),
        ("answer_length", np.int32),
        ("prompt_key", np.int64),
        ("row_key", np.int64),
        ("reply_key", np.int64),
        ("text_key", np.int64),
        ("flags", np.uint8),
    ]
)


@dataclass(frozen=True, slots=True)
class EncodingSpec:
    """All that turning rows into tokens depends on, picklable.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        format: of the rows, recognised.
        columns: our field names -> the rows'.
        template, alpaca_role, train_on, max_length, on_too_long: of the ``data`` group.
    """

    tokenizer: Any
    format: str
    columns: Mapping[str, str]
    template: str
    alpaca_role: str
    train_on: str
    max_length: int
    on_too_long: str


@dataclass(frozen=True, slots=True)
class Batch:
    """A chunk made into tokens.

    Attributes:
        rows: a serialised Arrow record batch of ``SCHEMA``; empty when no row was usable.
        facts: of the same rows, dtype ``FACTS``, shape (rows,).
        refused: the rows that are not among them.
    """

    rows: bytes
    facts: np.ndarray
    refused: tuple[RejectedRow, ...]


@dataclass(frozen=True, slots=True)
class _Record:
    fact: tuple[int, ...]
    ids: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int
    answer: str
    choices: str


class Encoder:
    """Makes chunks into tokens by one recipe.

    Raises:
        DataError: the template or the tokenizer cannot be used at all.
    """

    def __init__(self, recipe: EncodingSpec) -> None:
        self.recipe = recipe
        self.template = Template(recipe.tokenizer, recipe.template, recipe.alpaca_role, recipe.train_on)
        self.end_ids = frozenset(self.template.end_ids())
        self.bos_id = recipe.tokenizer.bos_token_id

    def batch(self, chunk: Chunk) -> Batch:
        """Every row of a chunk, as tokens or as refused, in its order."""
        records: list[_Record] = []
        refused: list[RejectedRow] = []
        for row in parse_rows(chunk):
            if isinstance(row, RejectedRow):
                refused.append(row)
                continue
            try:
                records.append(self._record(row))
            except RowError as error:
                message = str(error).removeprefix(row.where).lstrip(": ")
                refused.append(RejectedRow(row.where, error.code, message, _raw(chunk, row)))
        facts = np.array([r.fact for r in records], dtype=FACTS)
        return Batch(_serialised(records, facts), facts, tuple(refused))

    def _record(self, row: Row) -> _Record:
        example = parse_example(row, self.recipe.format, self.recipe.columns)
        whole = self.template.encode(example)
        cut = fit(whole, self.recipe, row.where, example.text is not None, self.template.bos_id)
        ids, loss_mask = np.asarray(cut.ids, dtype=np.int32), np.asarray(cut.loss_mask, dtype=np.bool_)
        learnt = int(loss_mask[1:].sum())  # nothing predicts the first token
        if not learnt:
            reason = "has no token that is learnt" + (" once it is cut" if cut is not whole else "")
            raise RowError("empty_loss_mask", row.where, reason=reason, hint="leave the row out")
        # Keys are of the uncut row: cut to the room that its answer leaves, equal prompts would no longer be equal.
        whole_ids, whole_labels = np.asarray(whole.ids, dtype=np.int32), np.asarray(whole.loss_mask, dtype=np.bool_)
        fact = (
            *(example.file, example.line, len(ids), learnt, len(ids) - cut.prompt_length),
            *(_key(whole_ids[: whole.opening_length].tobytes()), _key(whole_ids.tobytes())),
            *(_key(_first_reply(whole_ids, whole_labels).tobytes()), _key((example.text or example.answer).encode())),
            self._flags(ids, loss_mask, cut is not whole, example),
        )
        return _Record(fact, ids, loss_mask, cut.prompt_length, example.answer, example.choices)

    def _flags(self, ids: np.ndarray, loss_mask: np.ndarray, truncated: bool, example: Example) -> int:
        flags = TRUNCATED if truncated else 0
        cut_at_its_end = truncated and example.text is not None
        if not cut_at_its_end and int(ids[np.flatnonzero(loss_mask)[-1]]) not in self.end_ids:
            flags |= NO_END
        if self.bos_id is not None and list(ids[:2]) == [self.bos_id] * 2:
            flags |= DOUBLE_BOS
        return flags


def fit(encoded: Encoded, recipe: EncodingSpec, where: str, is_text: bool, bos_id: int | None) -> Encoded:
    """An example within ``max_length``; the very same object when it is short enough.

    ``truncate`` cuts plain text at its end, and of a conversation the oldest tokens: never any of the last answer, and
    never a begin token that stands first.

    Raises:
        RowError: ``too_long``: it may not be cut, or what would be left teaches nothing.
    """
    limit, excess = recipe.max_length, len(encoded.ids) - recipe.max_length
    if excess <= 0:
        return encoded
    if recipe.on_too_long != "truncate":
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
            reason=f"has nothing left to learn when it is cut to data.max_length={limit}",
            hint="raise data.max_length, or data.on_too_long=drop",
        )
    ids = encoded.ids[:kept] + encoded.ids[kept + excess :]
    return Encoded(ids, loss_mask, encoded.prompt_length - excess, max(kept, encoded.opening_length - excess))


def _first_reply(ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """The learnt tokens up to the first that is not: in a chat, the first learnt turn."""
    begin = int(loss_mask.argmax())
    gap = np.flatnonzero(~loss_mask[begin:])
    return ids[begin : begin + int(gap[0]) if len(gap) else len(ids)]


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _raw(chunk: Chunk, row: Row) -> str:
    """The text of a row: its line as it stands in the file, else its fields."""
    place = row.line - chunk.line
    return raw_text(chunk.lines[place] if 0 <= place < len(chunk.lines) else row.fields)


def _serialised(records: Sequence[_Record], facts: np.ndarray) -> bytes:
    if not records:
        return b""
    offsets = _column(pa.int32(), _ends(facts["length"]))
    ids, loss_mask = (np.concatenate([getattr(r, name) for r in records]) for name in ("ids", "loss_mask"))
    columns = [
        _column(pa.int32(), facts["file"]),
        _column(pa.int64(), facts["line"]),
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
        len(data), pa.py_buffer(_ends([len(d) for d in data])), pa.py_buffer(b"".join(data))
    )


def _column(kind: pa.DataType, values: np.ndarray, length: int | None = None) -> pa.Array:
    """An Arrow array of these very bytes. ``pa.array`` would do, but it imports pandas: 50 MB in every worker."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(values) if length is None else length, [None, pa.py_buffer(values)])


def _ends(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
