"""Overrides in hints are as they must be typed: what bash and then Hydra make of them is the value that was meant."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import launch.compare.compare
from trainer.config.messages import as_typed, in_shell
from trainer.config.overrides import parse
from trainer.errors import ConfigError

# Whatever a value may hold. Hydra resolves ${…} wherever it stands, and a new line is not typed.
TEXTS = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" ")).filter(lambda t: "${" not in t)
NUMBERS = st.integers() | st.floats(allow_nan=False)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
NAMES = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda name: name not in ("null", "inf", "nan"))
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3))


def words_in_bash(*lines: str, folder: Path | None = None) -> list[str]:
    """Return the words that a command gets when these are typed behind it."""
    script = f"set -f; printf '%s\\0' {' '.join(lines)}" if folder is None else f"printf '%s\\0' {' '.join(lines)}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True, cwd=folder)
    return done.stdout.decode().split("\0")[:-1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(VALUES, min_size=1, max_size=8))
def test_what_is_typed_is_read_back_through_bash_and_hydra(values: list[Any]) -> None:
    typed = [as_typed("method.init_text", value) for value in values]
    read = [parse(word).value() for word in words_in_bash(*typed)]
    assert read == values


@pytest.mark.parametrize(
    ("key", "value", "typed"),
    [
        ("compare.methods", ["lora", "qlora"], "'compare.methods=[lora,qlora]'"),
        ("compare.methods", ["lora r=8", "full"], "'compare.methods=[\"lora r=8\",full]'"),
        ("method.r", 8, "method.r=8"),
        ("data.path", "my.jsonl", "data.path=my.jsonl"),
        ("optim.learning_rate", None, "optim.learning_rate=null"),
        ("run.name", "null", "'run.name=\"null\"'"),
        ("data.columns", {"instruction": "question"}, "'data.columns={instruction:question}'"),
    ],
)
def test_what_is_plain_stays_plain(key: str, value: object, typed: str) -> None:
    assert as_typed(key, value) == typed


def test_a_file_that_a_pattern_would_match_is_not_put_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "eval.metrics=l").touch()
    assert words_in_bash("eval.metrics=[loss]", folder=tmp_path) == ["eval.metrics=l"]  # what the quotes are for
    assert words_in_bash(as_typed("eval.metrics", ["loss"]), folder=tmp_path) == ["eval.metrics=[loss]"]
    assert words_in_bash(in_shell("method.r", "interval(1,8)"), folder=tmp_path) == ["method.r=interval(1,8)"]


COMPARISONS = [
    "compare.methods=lora",
    "compare.methods=3",
    "compare.methods=[nope]",
    "compare.methods=[nope,full]",
    "compare.methods=[]",
    "compare.methods=null",
    "compare.methods=lora,qlora",
    "compare.methods=lora r=8,full",
    "compare.methods=[lora r=8,full]",
    "compare.methods=['lora rr=8']",
    "compare.methods=['lora r']",
    "compare.methods=['lorra r=4']",
    "compare.methods=lora rr=4,nope",
    "compare.tune=3",
    "compare.tune=[0]",
    "method=lora,qlora",
    "method.r=4,8",
    "rank=large",
]


@pytest.mark.parametrize("typed", COMPARISONS)
def test_the_hints_of_a_comparison_lead_out_of_the_mistake(typed: str) -> None:
    words = [typed]
    seen: list[list[str]] = []
    while (error := refusal(words)) is not None:
        seen.append(words)
        found = re.search(r"(?:^|: |for example |like )('[^']+'|\S+)$", error.hint)
        assert found, error.hint
        words = words_in_bash(found[1])
        assert words not in seen, f"the hints go in a circle: {seen}"
        assert len(seen) < 5
    assert seen, "it was no mistake"


def refusal(words: list[str]) -> ConfigError | None:
    """Return the error that a comparison is refused with."""
    try:
        launch.compare.compare.plan_comparison(["debug=tiny", *words])
    except ConfigError as error:
        return error
    return None
