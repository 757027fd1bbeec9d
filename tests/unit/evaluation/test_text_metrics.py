"""Scores of written answers: known values, and bounds that hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.evaluation.text_metrics import TEXT_METRICS, chrf, exact_match, rouge_l, token_f1

texts = st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEXT_METRICS)
@settings(max_examples=30, deadline=None)
@given(pairs=texts)
def test_scores_are_between_0_and_1(name: str, pairs: list[tuple[str, str]]) -> None:
    assert 0 <= TEXT_METRICS[name]([a for a, _ in pairs], [r for _, r in pairs]) <= 1 + 1e-9


@pytest.mark.parametrize("name", TEXT_METRICS)
def test_a_reference_is_its_own_best_answer(name: str) -> None:
    said = ["the cat sat on the mat", "no"]
    assert TEXT_METRICS[name](said, said) == pytest.approx(1)
    assert TEXT_METRICS[name](["x", "y"], said) < 0.2


def test_known_values() -> None:
    assert exact_match(["yes", "Yes"], ["yes", "yes"]) == 0.5
    # two of three and two of four words in common: 2 · 2 / 7
    assert token_f1(["The red, big cat"], ["a cat: big small old"]) == pytest.approx(4 / 7)
    assert token_f1([""], [""]) == 1
    assert token_f1([""], ["x"]) == 0
    assert token_f1(["", "A"], ["A", "A"]) == 0.5
    # longest common subsequence "police the gunman" of 4 and 4 words (Lin, 2004)
    assert rouge_l(["police kill the gunman"], ["police killed the gunman"]) == 1  # stemmed
    assert rouge_l(["the gunman kill police"], ["police killed the gunman"]) == pytest.approx(0.5)
    assert 0.5 < chrf(["the cat sat"], ["the cat sits"]) < 1
