"""On several ranks: every metric on real multiple-choice rows under ZeRO 0, 2 and 3, against stock transformers.

Many tokens end an answer here, so that rows are done at different lengths: under ZeRO-3 a rank that stops calling while
the other goes on would hang.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.distributed.bench import Bench
from trainer.evaluation.evaluate import generate_answers
from trainer.evaluation.text_metrics import TEXT_METRICS
from trainer.models.embedded import resolve

ZERO = ("stage0", "stage2", "stage3")
MEDICAL = [
    "data=medical",
    "data.on_too_long=drop",
    "data.max_rows=32",
    "data.validation=27",
    "eval.max_rows=null",
    "eval.batch_size=4",
]
MEDICAL += ["generate.max_new_tokens=8", "eval.metrics=[loss,choice_accuracy,exact_match,f1,rouge_l,chrf]"]
ENDS = list(range(3, 140))


class Evaluation:
    """Evaluate under a ZeRO stage; one reference for all."""

    def __init__(self) -> None:
        self.expected: dict[str, Any] = {}

    def __call__(self, bench: Bench, zero: str) -> dict[str, Any]:
        loop = bench.loop(bench.config(f"zero={zero}", *MEDICAL))
        loop.generator.end_ids = ENDS
        found: dict[str, Any] = loop.evaluate().metrics
        rows = loop.data.validation
        found["answers"] = [a for _, a, _ in generate_answers(loop.generator, rows, loop.config, bench.world)[0]]
        if bench.world.is_main and not self.expected:
            self.expected = reference(loop)
        return {"found": found, "expected": self.expected}


def reference(loop: Any) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    rows = loop.data.validation.examples(range(len(loop.data.validation)))
    tokenizer, right, losses, answers, lengths = loop.generator.tokenizer, 0, [], [], set()
    for row in rows:
        prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        with torch.no_grad():
            last = model(prompt).logits[0, -1]
            letters = {x: last[tokenizer.convert_tokens_to_ids(x)].item() for x in "ABCD"}
            right += max(letters, key=letters.__getitem__) == row["answer"]
            whole = torch.tensor([row["input_ids"]])
            logits = model(whole).logits[0, row["prompt_length"] - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, whole[0, row["prompt_length"] :], reduction="none"))
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8, eos_token_id=ENDS,
                pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()  # fmt: skip
        lengths.add(len(out))
        out = out[:-1] if out[-1] in ENDS else out
        answers.append(tokenizer.decode(out, skip_special_tokens=True).strip())
    assert len(lengths) > 2, "all answers are of one length"
    references = [row["answer"] for row in rows]
    texts = {name: score(answers, references) for name, score in TEXT_METRICS.items()}
    scores = {"eval_loss": torch.cat(losses).mean().item(), "choice_accuracy": right / len(rows)}
    return {**scores, "answers": answers, **texts}


if __name__ == "__main__":
    evaluation = Evaluation()
    Bench().record({zero: partial(evaluation, zero=zero) for zero in ZERO})
