"""Choose the rows to show: some for what they are, the others at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trainer.config.schema import TrainConfig
from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.trie import sort_by_tokens
from trainer.data.run_data import Data, Rows

ROWS_A_KIND = 3  # on the page
HELD_OUT_SHARE = 0.2
CANDIDATES_A_ROW = 20
MAX_SEARCHED = 512  # training rows that are read to find those of several turns and those with long shared prefixes


@dataclass(frozen=True, slots=True)
class Choice:
    """A row of one side, and what it was chosen for."""

    row: int
    held_out: bool
    why: list[str] = field(default_factory=list)


def choose_few(data: Data, config: TrainConfig, control_ids: frozenset[int], most: int) -> list[Choice]:
    """Choose rows for the terminal: the first of step 0, the longest, one of several turns, then more of step 0."""
    if not len(data.train):
        return []
    first = _step(data, config, 0)
    kinds: list[tuple[str, Iterable[int]]] = [
        ("first of step 0", first[:1]),
        ("the longest", longest(data.train, 1)),
        ("several turns", _several_turns(data.train, _first_rows(data, config), control_ids)[:1]),
        ("step 0", first[1:]),
    ]
    return _merge(data, ((row, False, why) for why, rows in kinds for row in rows), most)


def choose_many(data: Data, config: TrainConfig, control_ids: frozenset[int], most: int) -> list[Choice]:
    """Choose rows for the page: rows of every kind, those that findings name, and a seeded sample of both sides."""
    if not len(data.train):
        return []
    read = _first_rows(data, config)
    kinds: list[tuple[str, Iterable[int]]] = [
        ("in step 0", _step(data, config, 0)[:ROWS_A_KIND]),
        ("among the longest", longest(data.train, ROWS_A_KIND)),
        ("among the shortest", shortest(data.train, ROWS_A_KIND)),
        ("several turns", _several_turns(data.train, read, control_ids)[:ROWS_A_KIND]),
        ("shares a long prefix", _longest_shared_prefix(data.train, read)[:ROWS_A_KIND]),
    ]
    random = np.random.default_rng([config.run.seed, 4])
    held = min(len(data.validation), round(HELD_OUT_SHARE * most))
    wanted = [
        *((int(row), False, why) for why, rows in kinds for row in rows),
        *_rows_of_findings(data),
        *((int(row), True, "") for row in _sample(random, len(data.validation), held)),
        *((int(row), False, "") for row in _sample(random, len(data.train), most)),
    ]
    return _merge(data, wanted, most)


def _merge(data: Data, wanted: Iterable[tuple[int, bool, str]], most: int) -> list[Choice]:
    """Merge choices: each row once, with every reason; a mixture may hold one under several numbers."""
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
    """Return the rows that the run begins with, each once."""
    rows = min(MAX_SEARCHED, len(data.train))
    return global_batch(config.run.seed, 0, len(data.train), rows)


def longest(rows: Rows, most: int) -> list[int]:
    """Find the longest rows, the longest first."""
    return _smallest(rows, -rows.lengths, most)


def shortest(rows: Rows, most: int) -> list[int]:
    """Find the shortest rows, the shortest first."""
    return _smallest(rows, rows.lengths, most)


def _smallest(rows: Rows, values: np.ndarray, most: int) -> list[int]:
    if not len(rows):
        return []
    near = min(CANDIDATES_A_ROW * most, len(rows))  # a mixture may hold one row many times
    found = np.argpartition(values, near - 1)[:near]
    found = found[np.lexsort((found, values[found]))]
    once = {int(rows.indices[i]): int(i) for i in found[::-1]}
    return sorted(once.values(), key=found.tolist().index)[:most]


def _several_turns(rows: Rows, read: np.ndarray, control_ids: frozenset[int]) -> list[int]:
    """Sort rows by their turns in the loss, where any has several; else by their control tokens. Most first."""
    tokens = rows.tokens(read)
    turns = np.asarray([np.count_nonzero(np.diff(t.loss_mask.astype(np.int8), prepend=0) == 1) for t in tokens])
    controls = np.asarray([np.isin(t.ids, list(control_ids)).sum() for t in tokens])
    for counts, least in ((turns, 1), (controls, controls.min())):
        if counts.max() > least:
            order = np.argsort(-counts, kind="stable")
            return [int(read[i]) for i in order if counts[i] > least]
    return []


def _longest_shared_prefix(rows: Rows, read: np.ndarray) -> list[int]:
    """Sort rows by the prefix that they share with another row, the longest first."""
    order, shared = sort_by_tokens([t.ids for t in rows.tokens(read)])
    return [int(read[order[i]]) for i in np.argsort(-shared, kind="stable") if shared[i]]


def _rows_of_findings(data: Data) -> Iterator[tuple[int, bool, str]]:
    """Find the rows that findings name, as far as they are in use."""
    wanted = {where: finding.kind for finding in data.findings for where in finding.where}
    for rows, held_out in ((data.train, False), (data.validation, True)):
        found = np.concatenate([np.empty(0, np.int64), *(_rows_at(rows, where) for where in wanted)])
        numbers = np.flatnonzero(np.isin(rows.indices, found))
        for number, name in zip(numbers.tolist(), rows.names(numbers), strict=True):
            yield number, held_out, wanted[name].replace("_", " ")


def _rows_at(rows: Rows, where: str) -> np.ndarray:
    """Find the rows of the concatenated tables that stand at ``file:line``."""
    name, _, line = where.rpartition(":")
    found = [np.empty(0, np.int64)]
    for part, begin in zip(rows.tables.parts, rows.tables.starts):
        if name not in part.names or not line.isdigit():
            continue
        files, lines = (part.table.data.column(column).to_numpy() for column in ("file", "line"))
        found.append(begin + np.flatnonzero((lines == int(line)) & (files == part.names.index(name))))
    return np.concatenate(found)


def _sample(random: np.random.Generator, rows: int, most: int) -> np.ndarray:
    """Sample up to ``most`` of ``rows``, in the order of the file, without a list of all of them."""
    if most >= rows:
        return np.arange(rows)
    return np.sort(random.choice(rows, size=most, replace=False, shuffle=False))
