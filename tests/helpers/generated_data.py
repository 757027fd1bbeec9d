"""Prepared data made by hand, from token ids and masks: nothing of the path from text to tokens is in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from trainer.data.mixture import concatenate_tables
from trainer.data.prepare.finding import Finding
from trainer.data.prepare.table import PreparedTable
from trainer.data.run_data import Data, Rows

Row = tuple[Sequence[int], Sequence[bool]]
FEATURES = Features(
    {
        "file": Value("int32"),
        "line": Value("int64"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("bool")),
    }
)


def prepared(
    rows: Sequence[Row], name: str = "made.jsonl", folder: Path = Path("nowhere"), **values: Any
) -> PreparedTable:
    """Make a table of ``(ids, loss mask)``; row i stands in line i + 1."""
    columns = {
        "file": [0] * len(rows),
        "line": list(range(1, len(rows) + 1)),
        "input_ids": [list(ids) for ids, _ in rows],
        "labels": [list(mask) for _, mask in rows],
    }
    made = {
        "table": Dataset.from_dict(columns, features=FEATURES),
        "lengths": np.asarray([len(ids) for ids, _ in rows], dtype=np.int32),
        "label_counts": np.asarray([sum(mask[1:]) for _, mask in rows], dtype=np.int32),
        "hashes": np.zeros((3, len(rows)), dtype=np.int64),
        "fingerprint": "0" * 32,
        "names": (name,),
        "folder": folder,
        "refused": 0,
        "dropped": 0,
        "truncated": 0,
        "format": "alpaca",
        "findings": (),
    }
    return PreparedTable(**{**made, **values})


def data(table: PreparedTable, held_out: Sequence[int] = (), findings: Sequence[Finding] = ()) -> Data:
    """Make data of all rows of a table: training rows but those that are held out."""
    tables = concatenate_tables([table])
    train = np.asarray([i for i in range(len(table)) if i not in set(held_out)], dtype=np.int64)
    sides = (Rows(tables, train), Rows(tables, np.asarray(held_out, dtype=np.int64)))
    return Data(*sides, "f", (), (table,), tuple(findings))
