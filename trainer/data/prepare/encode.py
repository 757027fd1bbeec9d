"""Encode chunks of rows into columns of token ids and loss masks: what a worker process does, or the only process.

What is imported here is paid for by every worker: no torch, and not ``datasets``, which brings pandas along.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from trainer.data.formats.detect import explain
from trainer.data.formats.parse import parse_example
from trainer.data.formats.turns import Example
from trainer.data.prepare.arrow_columns import column, offsets_of, string_column
from trainer.data.prepare.grouping import group_hash, hash_bytes
from trainer.data.prepare.length import fit_to_max_length
from trainer.data.sources.rows import Chunk, RejectedRow, Row, RowError, parse_rows, raw_text
from trainer.data.templates.encoded import Encoded
from trainer.data.templates.rendered_rows import RenderedRows
from trainer.data.templates.template import Template

# Bits of ROW_STATS["flags"].
NO_END, DOUBLE_BOS, TRUNCATED, SPLIT, CONTROL, FOREIGN, ASKED_OTHERWISE, THINKS, NO_TOOLS = (1 << b for b in range(9))
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
# What is kept in memory of each row while a table is built, beside the table itself: 74 bytes.
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
        ("group_hash", np.int64),
        ("lost", np.int32),
        ("flags", np.uint16),
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
        template, alpaca_role, train_on, max_length, on_too_long, group_by, control_tokens, template_kwargs: of the
            ``data`` group.
    """

    tokenizer: Any
    format: str
    columns: Mapping[str, str]
    template: str
    alpaca_role: str
    train_on: str
    max_length: int
    on_too_long: str
    group_by: str | None = None
    control_tokens: str = "text"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk as tokens.

    Attributes:
        rows: a serialised Arrow record batch of ``SCHEMA``; empty when no row was usable.
        stats: of the same rows, dtype ``ROW_STATS``, shape (rows,).
        rejected: the rows that are not among them.
        unused: fields that nobody reads -> rows that hold something in them.
        controls: control tokens that the texts of rows hold, and turn markers of other tokenizers.
    """

    rows: bytes
    stats: np.ndarray
    rejected: tuple[RejectedRow, ...]
    unused: Mapping[str, int]
    controls: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class _Record:
    stats: tuple[int, ...]
    ids: np.ndarray
    loss_mask: np.ndarray
    prompt_length: int
    answer: str
    choices: str


class _Whole(NamedTuple):
    """What ``ROW_STATS`` tells of an uncut row: hashes, and counts of its turns."""

    prefix: int
    row: int
    reply: int
    text: int
    group: int
    unended: int
    lost_thoughts: int


class Encoder:
    """Encodes chunks by one specification.

    Raises:
        DataError: the template or the tokenizer cannot be used at all.
    """

    def __init__(self, spec: EncodingSpec) -> None:
        self.spec = spec
        named = (spec.template, spec.alpaca_role, spec.train_on, spec.template_kwargs)
        self.template = Template(spec.tokenizer, *named)
        is_text = spec.format == "text"  # a text ends with the tokenizer's own end, whatever the chat template writes
        end_ids = [spec.tokenizer.eos_token_id] if is_text else self.template.end_ids()
        self.rendered = RenderedRows(self.template) if spec.control_tokens == "parse" else None
        self.end_ids = frozenset([*end_ids, *(self.rendered.end_ids if self.rendered else ())])
        self.controls: set[str] = set()
        self.bos_id = spec.tokenizer.bos_token_id
        self._unused: Counter[str] = Counter()

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode or reject every row of a chunk, in its order."""
        records: list[_Record] = []
        rejected: list[RejectedRow] = []
        self.controls.clear()
        for row in parse_rows(chunk):
            if isinstance(row, RejectedRow):
                rejected.append(row)
                continue
            try:
                records += self._records(row)
            except RowError as error:
                error = explain(error, row, self.spec.format, self.spec.columns)
                message = str(error).removeprefix(row.where).lstrip(": ")
                rejected.append(RejectedRow(row.where, error.code, message, _raw(chunk, row), error.hint))
        stats = np.array([r.stats for r in records], dtype=ROW_STATS)
        unused, self._unused = self._unused, Counter()
        return EncodedChunk(_serialize(records, stats), stats, tuple(rejected), unused, frozenset(self.controls))

    def _records(self, row: Row) -> list[_Record]:
        """Encode a row: into one record, or several where it is split."""
        spec, example = self.spec, parse_example(row, self.spec.format, self.spec.columns)
        self._unused.update(example.unused)
        own, foreign = self.template.safe_tokenizer.find_in(_texts(example))
        self.controls |= own | foreign
        whole, example = self._encode(example)
        is_text, said = example.text is not None, CONTROL * bool(own) | FOREIGN * bool(foreign)
        said |= THINKS * whole.has_thoughts
        first = said | ASKED_OTHERWISE * (whole.asked_otherwise > 0) | NO_TOOLS * whole.drops_tools
        uncut = _describe(whole, example, group_hash(example, row, spec.group_by))
        pieces = fit_to_max_length(whole, spec.max_length, spec.on_too_long, row.where, is_text, self.template.bos_id)
        if pieces[0] is whole:
            return [self._record(example, whole, uncut, first)]
        if spec.on_too_long == "split":
            records, rest = [], uncut._replace(unended=0, lost_thoughts=0)  # turns are counted once
            for i, piece in enumerate(pieces):
                told, flags = (rest, said) if i else (uncut, first)
                records.append(self._record(example, piece, told, flags | SPLIT, piece is pieces[-1]))
            return records
        (cut,) = pieces
        return [self._record(example, cut, uncut, first | TRUNCATED, not is_text, len(whole.ids) - len(cut.ids))]

    def _encode(self, example: Example) -> tuple[Encoded, Example]:
        """Encode an example, and return it as it is scored."""
        if self.rendered is None:
            return self.template.encode(example), example
        example = self.rendered.without_ends(example)
        return self.rendered.encode(example) or self.template.encode(example), example

    def _record(
        self, example: Example, cut: Encoded, row: _Whole, flags: int, has_end: bool = True, lost: int = 0
    ) -> _Record:
        ids, loss_mask = np.asarray(cut.ids, dtype=np.int32), np.asarray(cut.loss_mask, dtype=np.bool_)
        label_count = int(loss_mask[1:].sum())  # nothing predicts the first token
        if not label_count:
            reason = "has no token in the loss" + (" once it is cut" if flags & (TRUNCATED | SPLIT) else "")
            raise RowError("empty_loss_mask", example.where, reason=reason, hint="leave the row out")
        row_hash = _hash(ids) if flags & SPLIT else row.row
        stats = (
            *(example.file, example.line, len(ids), label_count, len(ids) - cut.prompt_length),
            *(row.prefix, row_hash, row.reply, row.text, row.group),
            *(lost, flags | self._flags(ids, loss_mask, has_end), row.unended, row.lost_thoughts),
        )
        is_rest = flags & SPLIT and not cut.prompt_length  # a piece in which the scored answer does not begin
        answer, choices = ("", "") if is_rest else (example.answer, example.choices)
        return _Record(stats, ids, loss_mask, cut.prompt_length, answer, choices)

    def _flags(self, ids: np.ndarray, loss_mask: np.ndarray, has_end: bool) -> int:
        flags = 0
        last = int(ids[np.flatnonzero(loss_mask)[-1]])
        if has_end and last not in self.end_ids and not self.template.ends_turn(last):
            flags |= NO_END
        if self.bos_id is not None and list(ids[:2]) == [self.bos_id] * 2:
            flags |= DOUBLE_BOS
        return flags


def _texts(example: Example) -> Iterator[str]:
    yield example.text or ""
    for turn in example.turns:
        yield turn.text
        yield turn.input


def _describe(whole: Encoded, example: Example, group: int) -> _Whole:
    """Describe an uncut row by hashes and counts: cut to the room that its answer leaves, equal prompts would no longer
    be equal."""
    ids = np.asarray(whole.ids, dtype=np.int32)
    prefix, reply = _hash(ids[: whole.prompt_prefix_length]), hash_bytes(_first_reply(example, whole))
    text = hash_bytes((example.text or example.answer).encode())
    counts = (min(whole.unended, MOST), min(whole.lost_thoughts, MOST))
    return _Whole(prefix, _hash(ids), reply, text, group, *counts)


def _first_reply(example: Example, encoded: Encoded) -> bytes:
    """Return what the first turn in the loss says: not its tokens, since a template may end or open the last turn of a
    conversation otherwise. Of a text, or a row that is rendered already, the first run of tokens in the loss."""
    if encoded.first_turn is None:
        ids, loss_mask = np.asarray(encoded.ids, dtype=np.int32), np.asarray(encoded.loss_mask, dtype=np.bool_)
        begin = int(loss_mask.argmax())
        gap = np.flatnonzero(~loss_mask[begin:])
        return ids[begin : begin + int(gap[0]) if len(gap) else len(ids)].tobytes()
    turn = example.turns[encoded.first_turn]
    extra = json.dumps(turn.extra, sort_keys=True, default=str) if turn.extra else ""
    return f"{turn.text.strip()}\0{extra}".encode()


def _hash(ids: np.ndarray) -> int:
    return hash_bytes(ids.tobytes())


def _raw(chunk: Chunk, row: Row) -> str:
    """Return the text of a row: its line as it stands in the file, else its fields."""
    place = row.line - chunk.line
    return raw_text(chunk.lines[place] if 0 <= place < len(chunk.lines) else row.fields)


def _serialize(records: Sequence[_Record], stats: np.ndarray) -> bytes:
    if not records:
        return b""
    offsets = column(pa.int32(), offsets_of(stats["length"]))
    ids, loss_mask = (np.concatenate([getattr(r, name) for r in records]) for name in ("ids", "loss_mask"))
    columns = [
        column(pa.int32(), stats["file"]),
        column(pa.int64(), stats["line"]),
        pa.ListArray.from_arrays(offsets, column(pa.int32(), ids)),
        pa.ListArray.from_arrays(
            offsets, column(pa.bool_(), np.packbits(loss_mask, bitorder="little"), len(loss_mask))
        ),
        column(pa.int32(), np.asarray([record.prompt_length for record in records], dtype=np.int32)),
        string_column([record.answer for record in records]),
        string_column([record.choices for record in records]),
    ]
    return bytes(pa.RecordBatch.from_arrays(columns, schema=SCHEMA).serialize())
