"""The commands of README and docs/ that take seconds, run as they stand there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.docs import PAGES, Block, blocks
from tests.helpers.processes import ROOT, run

TESTED = [block for page in PAGES for block in blocks(page) if block.is_tested]
ROWS = 40


def test_there_are_some() -> None:
    assert {block.page.name for block in TESTED} >= {"README.md", "methods.md", "clusters.md"}


@pytest.mark.parametrize("block", TESTED, ids=str)
def test_block_runs(block: Block, tmp_path: Path, tiny_model: Path, smollm2: Path) -> None:
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    for model in (tiny_model, smollm2):
        (models / model.name).symlink_to(model)
    rows = (ROOT / "examples" / "headlines" / "headlines.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    (tmp_path / "my.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    script = f'export PATH="{Path(sys.executable).parent}:$PATH"\n{block.text}\n'
    done = run(["bash", "-e", "-c", script], cwd=tmp_path, env={"AFINA_CACHE": str(tmp_path / "cache")})
    assert "Traceback" not in done.output
