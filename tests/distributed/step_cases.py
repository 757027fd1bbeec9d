"""On two ranks: what must hold of a step, of generation and of an adapter besides the update."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import trainer.kernels.label_loss
from tests.distributed.bench import Bench, reference_batches
from tests.helpers.reference import mean_loss, reference_model
from trainer.config import TrainConfig
from trainer.distributed.process_group import gather_objects
from trainer.engine.whole_state import gather_live, gather_state
from trainer.errors import TrainingError
from trainer.evaluation.evaluate import generate_answers
from trainer.methods import save_adapter
from trainer.models.embedded import resolve
from trainer.training.loop import Loop
from trainer.training.outcome import Outcome, Progress

ZERO = ("stage0", "stage1", "stage2", "stage3")
SKIPPED = (
    *((zero, "loss", "lora") for zero in ZERO),
    ("stage2", "gradient", "lora"),
    ("stage2", "loss", "full"),
    ("stage3", "gradient", "full"),
)
QUANTIZED = (("qlora", "stage2"), ("qlora", "stage3"), ("qlora_8bit", "stage2"))


def loss_equals_transformers(bench: Bench) -> float | None:
    """Relative distance of the first step's loss."""
    loop = bench.loop(bench.config("zero=stage2"))
    record = loop.step(0).record
    if not bench.world.is_main:
        return None
    stock = reference_model(resolve("tiny"), loop.config)
    expected = mean_loss(stock, reference_batches(loop, 1)[0]).item()
    return abs(record["loss"] - expected) / expected


def adapter_loads_in_stock_peft(bench: Bench, zero: str) -> dict[str, float] | None:
    """The live model's logits against the saved adapter on a freshly loaded base, both on one process."""
    loop = bench.loop(bench.config(f"zero={zero}"))
    for step in range(3):
        loop.step(step)
    ids = torch.arange(40).reshape(2, 20)
    loop.engine.eval()
    with torch.no_grad():
        live = loop.engine.deepspeed(input_ids=ids, use_cache=False).logits
    weights = gather_live(loop.engine, only_trainable=True)
    if not bench.world.is_main:
        return None
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp())
    save_adapter(loop.engine.model, folder, weights)
    base = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    untouched = base(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
    return {
        "distance": float((loaded - live).abs().max()),
        "changes the base by": float((loaded - untouched).abs().max()),
    }


def quantized_base_learns_and_stays(bench: Bench, method: str, zero: str) -> dict[str, Any]:
    overrides = [f"zero={zero}", f"method={method}", "model.dtype=bf16", "batch.max_steps=8", "optim.eps=1e-8"]
    loop = bench.loop(bench.config(*overrides, "optim.weight_decay=0"))
    loop.evaluate()  # on CPU, bitsandbytes lays 4-bit weights out differently at their first use: the same values
    before = _frozen_bytes(loop)
    losses = [loop.step(step).record["loss"] for step in range(8)]
    again = loop.step(0).record["loss"]  # the first batch once more
    return {"losses": [losses[0], again], "base unchanged": before == _frozen_bytes(loop)}


def _frozen_bytes(loop: Loop) -> list[int]:
    """A checksum of every frozen tensor, as this rank holds it."""
    sums = []
    for name, parameter in loop.engine.model.named_parameters():
        if name not in loop.engine.trainable_params:
            held = getattr(parameter, "ds_tensor", parameter).detach().contiguous()
            sums.append(int(held.reshape(-1).view(torch.uint8).to(torch.int64).sum()))
    return sums


def fp16_overflow_is_skipped(bench: Bench) -> dict[str, Any]:
    loop = bench.loop(bench.config("zero=stage2", "model.dtype=fp16", "batch.max_steps=8"))
    loop.engine.optimizer.loss_scaler.cur_scale = 2.0**40  # any gradient overflows
    loop.engine.optimizer.loss_scaler.cur_hysteresis = 1
    start = _lora_b(loop)
    record = loop.step(0).record
    same = all(torch.equal(a, b) for a, b in zip(start, _lora_b(loop), strict=True))
    loop.engine.optimizer.loss_scaler.cur_scale = 2.0**8
    losses = [loop.step(step).record["loss"] for step in range(1, 8)] + [loop.step(1).record["loss"]]
    return {"scale": record["loss_scale"], "changed nothing": same, "losses": [losses[0], losses[-1]]}


def _lora_b(loop: Loop) -> list[Tensor]:
    return [p.detach().clone() for n, p in loop.engine.trainable_params.items() if "lora_B" in n]


def chunks_equal_one_call(bench: Bench, zero: str, overrides: list[str]) -> float | None:
    """Three steps with the vocabulary matrix in chunks of two labels, ranks with unlike numbers of them, against all
    labels at once."""
    config = bench.config(f"zero={zero}", "batch.micro_size=3", *overrides)
    states = []
    for chunk_elements in (trainer.kernels.label_loss.CHUNK_ELEMENTS, 2 * 384):
        with patch.object(trainer.kernels.label_loss, "CHUNK_ELEMENTS", chunk_elements):
            loop = bench.loop(config)
        for step in range(3):
            loop.step(step)
        states.append(gather_live(loop.engine, only_trainable=True))
    if not bench.world.is_main:
        return None
    return max(float((states[1][n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in states[0].items())


def generation_in_lockstep(bench: Bench) -> dict[str, Any] | None:
    """Greedy answers under ZeRO-3, ranks with rows of unlike length and number, against one stock process."""
    loop = bench.loop(bench.config("zero=stage3", "eval.max_rows=7", "eval.batch_size=2", "generate.max_new_tokens=6"))
    loop.engine.eval()
    rows = loop.data.validation
    answers = [a for _, a, _ in generate_answers(loop.generator, rows, loop.config, bench.world)[0]]
    if not bench.world.is_main:
        return None
    stock = reference_model(resolve("tiny"), loop.config).eval()
    expected = []
    for example in rows.examples(range(len(rows))):
        prompt = torch.tensor([example["input_ids"][: example["prompt_length"]]])
        out = stock.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ids = [t for t in out[0, prompt.shape[1] :].tolist() if t not in loop.generator.end_ids]
        expected.append(loop.generator.decode(ids).strip())
    return {"rows": len(answers), "equal": answers == expected}


def not_finite_is_named(bench: Bench, zero: str, what: str) -> dict[str, Any]:
    """Rank 1 alone meets a NaN, in a loss or a gradient: every rank stops at that step, no tensor has changed."""
    loop = bench.loop(bench.config(f"zero={zero}"))
    loop.step(0)
    before = gather_state(loop.engine)
    if bench.world.rank == 1:
        loop.engine.loss = _Poisoned(loop.engine.loss, what)
    message = None
    try:
        loop.step(1)
    except TrainingError as error:
        message = str(error)
    messages = gather_objects(message)
    after = gather_state(loop.engine)
    return {"messages": messages, "unchanged": all(torch.equal(before[n], after[n]) for n in before)}


def skipped_step_is_as_if_it_were_not_there(bench: Bench, zero: str, what: str, method: str) -> dict[str, Any]:
    """Steps 1 to 4 with a NaN on rank 1 in the second, left out, against the others alone."""
    config = bench.config(f"zero={zero}", f"method={method}", "rank=null", "fault.non_finite=skip")
    loop = bench.loop(config, bench.shared_folder())
    records = _steps_with_a_nan(loop, 4, at=1, what=what)
    return {"records": records, "equal": _same_state(loop, _steps_alone(bench, config, (0, 2, 3)))}


def rewound_run_goes_on_from_the_checkpoint(bench: Bench, zero: str) -> dict[str, Any]:
    """A checkpoint after 2 steps, a NaN in the 4th: the 3rd and 4th are left out; and again from there."""
    config = bench.config(f"zero={zero}", "fault.non_finite=rewind")
    folder = bench.shared_folder()
    loop = bench.loop(config, folder)
    for step in range(2):
        loop.step(step)
    loop.checkpointer.save(2, monitor_state=loop.monitor.state())
    loop.step(2)
    loop.checkpointer.save(3, monitor_state=loop.monitor.state())
    records = _steps_with_a_nan(loop, 2, at=3, what="loss", start=3)
    alone = _steps_alone(bench, config, (0, 1, 4))
    resumed = bench.loop(config, folder)
    restored = resumed.checkpointer.restore(folder / "checkpoints" / "step-00000002")
    more = _steps_with_a_nan(resumed, 2, at=-1, what="loss", start=restored.step)
    folders = sorted(f.name for f in (folder / "checkpoints").iterdir())
    equal = [_same_state(loop, alone), _same_state(resumed, alone)]
    return {"records": [*records, *more], "equal": equal, "folders": folders}


def _steps_with_a_nan(loop: Loop, count: int, *, at: int, what: str, start: int = 0) -> list[list[int]]:
    """Take the next steps as a run does; return of each its number, and how many were skipped so far."""
    progress = Progress(Outcome("finished", start), start)
    sound, found = loop.engine.loss, []
    for _ in range(count):
        is_bad = loop.world.rank == 1 and progress.outcome.steps == at
        loop.engine.loss = _Poisoned(sound, what) if is_bad else sound
        record = loop.next_step(progress).record
        progress.outcome.steps += 1
        found.append([record["step"], record.get("skipped_steps", 0)])
    return found


def _steps_alone(bench: Bench, config: TrainConfig, steps: tuple[int, ...]) -> Loop:
    loop = bench.loop(config)
    for step in steps:
        loop.step(step)
    return loop


def _same_state(one: Loop, other: Loop) -> bool:
    a, b = gather_state(one.engine), gather_state(other.engine)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class _Poisoned:
    def __init__(self, loss: Any, what: str) -> None:
        self.loss, self.what = loss, what

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        loss: Tensor = self.loss(forward, batch)
        if self.what == "loss":
            return loss * float("nan")
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss


CASES: dict[str, Callable[[Bench], Any]] = {
    "loss": loss_equals_transformers,
    **{f"adapter {zero}": partial(adapter_loads_in_stock_peft, zero=zero) for zero in ZERO},
    **{f"not finite loss {zero}": partial(not_finite_is_named, zero=zero, what="loss") for zero in ZERO},
    **{f"not finite gradient {zero}": partial(not_finite_is_named, zero=zero, what="gradient") for zero in ZERO},
    **{
        f"skipped {what} {zero} {method}": partial(
            skipped_step_is_as_if_it_were_not_there, zero=zero, what=what, method=method
        )
        for zero, what, method in SKIPPED
    },
    **{f"rewound {zero}": partial(rewound_run_goes_on_from_the_checkpoint, zero=zero)
       for zero in ("stage0", "stage2", "stage3")},
    **{f"chunks {zero}": partial(chunks_equal_one_call, zero=zero, overrides=[]) for zero in ZERO},
    **{
        f"chunks {zero} method=full": partial(chunks_equal_one_call, zero=zero, overrides=["method=full"])
        for zero in ("stage2", "stage3")
    },
    "generation": generation_in_lockstep,
    **{f"{method} {zero}": partial(quantized_base_learns_and_stays, method=method, zero=zero)
       for method, zero in QUANTIZED},
}  # fmt: skip
if torch.ops.mkldnn._is_mkldnn_fp16_supported():
    CASES["fp16"] = fp16_overflow_is_skipped


if __name__ == "__main__":
    Bench().record(CASES)
