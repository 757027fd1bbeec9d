"""Which rows are shown: some for what they are, the others by lot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.trie import sort_by_tokens
from trainer.data.run_data import Data, Rows

EACH = 3  # rows of a kind on the page
HELD_OUT_SHARE = 0.2
READ_FOR_EACH = 20
LOOKED_AT = 512  # training rows that are read to find those of several turns and those that share most


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of one side, and what it was chosen for."""

    row: int
    held_out: bool
    why: list[str] = field(default_factory=list)


def few(data: Data, config: TrainConfig, control_ids: frozenset[int], most: int) -> list[Choice]:
    """For the terminal: the first row of the first step, the longest, one of several turns, then more of that step."""
    if not len(data.train):
        return []
    first = _step(data, config, 0)
    kinds: list[tuple[str, Iterable[int]]] = [
        ("first of step 0", first[:1]),
        ("the longest", longest(data.train, 1)),
        ("several turns", _several_turns(data.train, _first_rows(data, config), control_ids)[:1]),
        ("step 0", first[1:]),
    ]
    return _merged(data, ((row, False, why) for why, rows in kinds for row in rows), most)


def many(data: Data, config: TrainConfig, control_ids: frozenset[int], most: int) -> list[Choice]:
    """For the page: rows of every kind, those that findings name, and a seeded sample of both sides."""
    if not len(data.train):
        return []
    read = _first_rows(data, config)
    kinds: list[tuple[str, Iterable[int]]] = [
        ("in step 0", _step(data, config, 0)[:EACH]),
        ("among the longest", longest(data.train, EACH)),
        ("among the shortest", shortest(data.train, EACH)),
        ("several turns", _several_turns(data.train, read, control_ids)[:EACH]),
        ("shares its beginning", _most_shared(data.train, read)[:EACH]),
    ]
    draw = np.random.default_rng([config.run.seed, 4])
    held = min(len(data.validation), round(HELD_OUT_SHARE * most))
    wanted = [
        *((int(row), False, why) for why, rows in kinds for row in rows),
        *_named(data),
        *((int(row), True, "") for row in _some(draw, len(data.validation), held)),
        *((int(row), False, "") for row in _some(draw, len(data.train), most)),
    ]
    return _merged(data, wanted, most)


def _merged(data: Data, wanted: Iterable[tuple[int, bool, str]], most: int) -> list[Choice]:
    """Each row once, with every reason; a mixture may hold one under several numbers."""
    out: dict[tuple[bool, int], Choice] = {}
    for row, held_out, why in wanted:
        key = (held_out, int((data.validation if held_out else data.train).indices[row]))
        if key not in out and len(out) >= most:
            continue
        choice = out.setdefault(key, Choice(int(row), held_out))
        if why and why not in choice.why:
            choice.why.append(why)
    return list(out.values())


def _step(data: Data, config: TrainConfig, step: int) -> np.ndarray:
    rows = len(data.train)
    return global_batch(config.run.seed, step, rows, min(config.batch.global_size, rows))


def _first_rows(data: Data, config: TrainConfig) -> np.ndarray:
    """The rows that the run begins with, each once."""
    rows = min(LOOKED_AT, len(data.train))
    return global_batch(config.run.seed, 0, len(data.train), rows)


def longest(rows: Rows, most: int) -> list[int]:
    """The longest rows, the longest first."""
    return _least(rows, -rows.lengths, most)


def shortest(rows: Rows, most: int) -> list[int]:
    """The shortest rows, the shortest first."""
    return _least(rows, rows.lengths, most)


def _least(rows: Rows, values: np.ndarray, most: int) -> list[int]:
    if not len(rows):
        return []
    near = min(READ_FOR_EACH * most, len(rows))  # a mixture may hold one row many times
    found = np.argpartition(values, near - 1)[:near]
    found = found[np.lexsort((found, values[found]))]
    once = {int(rows.indices[i]): int(i) for i in found[::-1]}
    return sorted(once.values(), key=found.tolist().index)[:most]


def _several_turns(rows: Rows, read: np.ndarray, control_ids: frozenset[int]) -> list[int]:
    """Rows with several learnt stretches; where none has, those with more control tokens than others. Most first."""
    tokens = rows.tokens(read)
    stretches = np.asarray([np.count_nonzero(np.diff(t.loss_mask.astype(np.int8), prepend=0) == 1) for t in tokens])
    controls = np.asarray([np.isin(t.ids, list(control_ids)).sum() for t in tokens])
    for counts, least in ((stretches, 1), (controls, controls.min())):
        if counts.max() > least:
            order = np.argsort(-counts, kind="stable")
            return [int(read[i]) for i in order if counts[i] > least]
    return []


def _most_shared(rows: Rows, read: np.ndarray) -> list[int]:
    """Rows of which most of the beginning is another row's too."""
    order, begins = sort_by_tokens([t.ids for t in rows.tokens(read)])
    return [int(read[order[i]]) for i in np.argsort(-begins, kind="stable") if begins[i]]


def _named(data: Data) -> Iterator[tuple[int, bool, str]]:
    """The rows that findings name, as far as they are in use."""
    wanted = {where: finding.kind for finding in data.findings for where in finding.where}
    for rows, held_out in ((data.train, False), (data.validation, True)):
        found = np.concatenate([np.empty(0, np.int64), *(_rows_named(rows, where) for where in wanted)])
        numbers = np.flatnonzero(np.isin(rows.indices, found))
        for number, name in zip(numbers.tolist(), rows.names(numbers), strict=True):
            yield number, held_out, wanted[name].replace("_", " ")


def _rows_named(rows: Rows, where: str) -> np.ndarray:
    """The rows of the joined table that stand at ``file:line``."""
    name, _, line = where.rpartition(":")
    found = [np.empty(0, np.int64)]
    for part, begin in zip(rows.tables.parts, rows.tables.starts):
        if name not in part.names or not line.isdigit():
            continue
        files, lines = (part.table.data.column(column).to_numpy() for column in ("file", "line"))
        found.append(begin + np.flatnonzero((lines == int(line)) & (files == part.names.index(name))))
    return np.concatenate(found)


def _some(draw: np.random.Generator, rows: int, most: int) -> np.ndarray:
    """Up to ``most`` of ``rows``, in the order of the file, without a list of all of them."""
    if most >= rows:
        return np.arange(rows)
    return np.sort(draw.choice(rows, size=most, replace=False, shuffle=False))
