"""``prepare`` on rows of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tokenizers import write_rows
from trainer.config.dataset_spec import DatasetSpec
from trainer.config.schema import DataConfig
from trainer.data.prepare.prepare import prepare
from trainer.data.prepare.table import PreparedTable

ROWS = [{"instruction": f"Say {i} " + "word " * (i % 5), "output": f"{i}" * (1 + i % 3)} for i in range(23)]


class Asked:
    """``prepare`` on rows of its own, counting how often a table is built."""

    def __init__(self, folder: Path, tokenizer: Any, logged: list[str]) -> None:
        self.path = write_rows(folder / "rows.jsonl", ROWS)
        self.cache, self.tokenizer, self.logged = folder / "cache", tokenizer, logged

    def __call__(self, tokenizer: Any = None, **keys: Any) -> PreparedTable:
        data = DataConfig(**{"path": str(self.path), **keys})
        return prepare(DatasetSpec(str(self.path)), data, tokenizer or self.tokenizer, self.cache)

    def refused(self, found: PreparedTable) -> list[dict[str, str]]:
        return [json.loads(line) for line in found.refused_file.read_text().splitlines()]
