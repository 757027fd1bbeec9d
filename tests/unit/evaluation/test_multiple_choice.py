"""The letters' tokens, read where a template has the model write something before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.prepared_data import Asked
from tests.helpers.tokenizers import with_template, write_rows
from trainer.data.mixture import concatenate_tables
from trainer.data.run_data import Rows
from trainer.data.templates.template import Template
from trainer.evaluation.multiple_choice import letter_tokens
from trainer.models.embedded.tiny import CHATML


def test_letters_behind_the_opening_of_an_answer(tmp_path: Path, tokenizer: Any, logged: list[str]) -> None:
    opens = CHATML.replace(
        "message['content'] +", "('<think></think>' if message['role'] == 'assistant' else '') + message['content'] +"
    )
    used = with_template(tokenizer, opens)
    asked = Asked(tmp_path, used, logged)
    rows = [{"question": f"Which {i}?", "options": ["a", "b"], "answer": i % 2} for i in range(4)]
    asked.path = write_rows(tmp_path / "choices.jsonl", rows)
    opening = Template(used, "chat").opening_ids()
    assert used.decode(opening) == "<think></think>"
    found = letter_tokens(Rows(concatenate_tables([asked()]), np.arange(4)), len(opening))
    assert found == {letter: used(letter).input_ids[0] for letter in "AB"}
