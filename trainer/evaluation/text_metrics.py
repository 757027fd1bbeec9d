"""Score generated answers against their references: text metrics between 0 and 1."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of answers that are their reference to the letter."""
    return sum(a == r for a, r in zip(answers, references, strict=True)) / len(answers)


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1 of the words of answer and reference as bags, as in SQuAD (Rajpurkar et al., 2016): letter
    case, punctuation and English articles do not count."""
    return sum(_f1(_words(a), _words(r)) for a, r in zip(answers, references, strict=True)) / len(answers)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean ROUGE-L F-measure (Lin, 2004), with stemming, by ``rouge-score``."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return float(sum(scores) / len(scores))


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Return chrF2 of the whole corpus (Popović, 2015), by ``sacrebleu``, divided by 100."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(answers), [list(references)]).score) / 100


def _words(text: str) -> list[str]:
    plain = "".join(" " if c in string.punctuation else c for c in text.lower())
    words = plain.split()
    return [word for word in words if word not in ("a", "an", "the")] or words  # the letter A is an answer too


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference))


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
    "chrf": chrf,
}
