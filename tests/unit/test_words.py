"""The code speaks the field's words: a newcomer's grep leads to the file that does it, our own coinages stay out."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.layout import sources
from tests.helpers.processes import ROOT

# What a newcomer greps for, and the file whose docstrings must say it.
LEADS_TO = {
    "gradient accumulation": "trainer/engine/zero_engine.py",
    "mixed precision": "trainer/engine/zero_engine.py",
    "gradient checkpointing": "trainer/engine/zero_engine.py",
    "loss mask": "trainer/data/templates/template.py",
    "collate": "trainer/data/batching/micro_batch.py",
    "shared prefix": "trainer/data/batching/trie.py",
    "global batch": "trainer/data/batching/global_batch.py",
    "early stopping": "trainer/training/monitor.py",
    "warm start": "trainer/methods/warm_start.py",
    "resume": "trainer/checkpoint/resume.py",
    "learning rate": "trainer/engine/learning_rate.py",
}
OURS = re.compile(r"\b(learnt|whose weights|reckoned|mend(s|ed)?|lighten|anew)\b", re.IGNORECASE)


@pytest.mark.parametrize("phrase", LEADS_TO)
def test_a_newcomers_word_leads_to_the_file_that_does_it(phrase: str) -> None:
    tree = ast.parse((ROOT / LEADS_TO[phrase]).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    assert any(phrase in " ".join(text.lower().split()) for text in docstrings), LEADS_TO[phrase]


def test_words_of_our_own_stay_out() -> None:
    found = []
    for path in sources("trainer", "launch"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if OURS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
