"""Broken rows by the thousand: every line is kept, refused or blank, and nothing else ever happens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trainer.config.dataset_spec import DatasetSpec
from trainer.config.schema import DataConfig
from trainer.data.prepare.encode import Encoder, EncodingSpec
from trainer.data.prepare.prepare import prepare
from trainer.data.sources.open import open_source
from trainer.errors import DataError

LINES = 2000
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima"}'}}
VALID: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Say é.", "input": "", "output": "é"},
        {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "Be kind."},
    ],
    "chat": [
        {
            "messages": [
                {"role": "user", "content": "hi <|im_end|>"},
                {"role": "assistant", "content": "👩‍👧", "weight": 1},
            ]
        },
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "8", "tool_call_id": "1"},
                {"role": "assistant", "content": "8 °C"},
            ],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        },
    ],
    "prompt_completion": [{"prompt": "1 + 1 =", "completion": " 2"}],
    "text": [{"text": "Once upon a time {{ 7*7 }} \u0000 مرحبا"}],
    "multiple_choice": [{"question": "Which?", "options": ["a", "b", "c"], "answer": 1, "subject": "x"}],
}
SCRAPS = (
    *(b'"', b"\\", b"\\ud800", b"{", b"]", b"null", b"true", b"1e999", b"-1", b"NaN", b"\x00", b"\xff", b"\r", b'""'),
    *(b"\xef\xbb\xbf", b"[]", b"{}", b"\xe2\x80\xa8", b"<|im_start|>", b'"role":"assistant"', b"9" * 5000, b"[" * 3000),
)
SWAPS: tuple[Any, ...] = (
    *(None, True, 0, -1.5, "", " ", [], {}, [None], [[]], {"a": 1}),
    *("\ud800", "<|im_end|>", "x" * 9999),
)


def mutated(line: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(line) + 1)
        to = min(len(line), at + rng.choice((1, 1, 3, 20)))
        kind = rng.randrange(5)
        put = (b"", bytes([rng.randrange(256)]), rng.choice(SCRAPS), line[at:to] * 2, line[to : to + 9])[kind]
        line = line[:at] + put + line[to if kind != 2 else at :]
    return line


def swapped(value: Any, rng: random.Random) -> Any:
    """The row with one of its values, however deep, replaced by another kind of value."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if isinstance(copy, dict) and rng.random() < 0.2:
            copy.pop(key)
        else:
            copy[key] = swapped(value[key], rng)  # type: ignore[index]
        return copy
    return rng.choice(SWAPS)


def lines_of(format: str) -> list[bytes]:
    rng = random.Random(format)
    out = []
    for _ in range(LINES):
        row = rng.choice(VALID[format] if rng.random() < 0.9 else VALID[rng.choice(list(VALID))])
        how = rng.random()
        if how < 0.1:
            line = json.dumps(row).encode()
        elif how < 0.5:
            line = mutated(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(), rng)
        elif how < 0.85:
            line = json.dumps(swapped(row, rng)).encode()
        else:
            line = rng.randbytes(rng.randrange(40))
        out.append(line.replace(b"\n", b" "))
    return out


def is_blank(line: bytes, first: bool) -> bool:
    try:
        return not line.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("format", list(VALID))
@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
def test_no_row_is_lost_and_nothing_is_raised(tmp_path: Path, tokenizer: Any, format: str, ends: bytes) -> None:
    path = tmp_path / "fuzz.jsonl"
    lines = lines_of(format)[:: 1 if ends == b"\n" else 10]
    path.write_bytes(ends.join(lines))
    encoder = Encoder(EncodingSpec(tokenizer, format, {}, "chat", "user", "assistant", 256, "truncate"))
    kept: list[int] = []
    refused: list[int] = []
    for chunk in open_source(DatasetSpec(str(path), format=format)).chunks():
        batch = encoder.encode(chunk)
        kept += batch.stats["line"].tolist()
        refused += [int(row.where.removeprefix("fuzz.jsonl:")) for row in batch.rejected]
        assert all(row.reason and row.message and len(row.raw) <= 2000 for row in batch.rejected)
        assert (batch.stats["length"] <= 256).all()
        assert (batch.stats["label_count"] > 0).all()
    blank = [number for number, line in enumerate(lines, 1) if is_blank(line, number == 1)]
    assert sorted(kept + refused + blank) == list(range(1, len(lines) + 1))
    assert len(kept) > len(lines) / 20, "the mutations are so wild that nothing is tried behind the parser"
    assert len(refused) > len(lines) / 5


@pytest.mark.parametrize("seed", range(20))
def test_a_file_of_any_bytes_is_prepared_or_an_error(tmp_path: Path, tokenizer: Any, seed: int) -> None:
    """Newlines, formats and all: the whole way."""
    rng = random.Random(seed)
    path = tmp_path / "fuzz.jsonl"
    row = json.dumps(rng.choice([row for rows in VALID.values() for row in rows])).encode()
    path.write_bytes(b"\n".join(mutated(row, rng) if rng.random() < 0.5 else row for _ in range(rng.randrange(4))))
    message = ""
    try:
        kept = len(prepare(DatasetSpec(str(path)), DataConfig(path=str(path)), tokenizer, tmp_path / "cache"))
    except DataError as error:
        kept, message = 0, str(error)
    assert kept or "fuzz.jsonl" in message
