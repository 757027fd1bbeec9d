"""Under torchrun with 2 ranks: what must hold besides the arithmetic of a step."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import trainer.kernels.label_loss
from tests.distributed.monitor_cases import watch_whole_runs
from tests.distributed.support_cases import Bench, reference_batches
from tests.helpers.logged_lines import LoggedLines
from tests.helpers.reference import mean_loss, reference_model
from trainer.checkpoint.resume import find_resume_point
from trainer.distributed.process_group import from_main, gather_objects
from trainer.engine.whole_state import gather_live, gather_state
from trainer.errors import CheckpointError, TrainingError
from trainer.methods import save_adapter
from trainer.models.embedded import resolve
from trainer.training.loop import Loop

ZERO = ("stage0", "stage1", "stage2", "stage3")


def shared_folder() -> Path:
    return Path(from_main(tempfile.mkdtemp()))


def loss_equals_transformers(bench: Bench) -> None:
    loop = bench.loop(bench.config("zero=stage2"))
    record = loop.step(0).record
    if bench.world.is_main:
        stock = reference_model(resolve("tiny"), loop.config)
        expected = mean_loss(stock, reference_batches(loop, 1)[0]).item()
        bench.note("loss distance", abs(record["loss"] - expected) / expected)


def adapter_loads_in_stock_peft(bench: Bench, zero: str) -> None:
    """The live model's logits against the saved adapter on a freshly loaded base, both on one process."""
    loop = bench.loop(bench.config(f"zero={zero}"))
    for step in range(3):
        loop.step(step)
    ids = torch.arange(40).reshape(2, 20)
    loop.engine.eval()
    with torch.no_grad():
        live = loop.engine.deepspeed(input_ids=ids, use_cache=False).logits
    weights = gather_live(loop.engine, only_trainable=True)
    if bench.world.is_main:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = Path(tempfile.mkdtemp())
        save_adapter(loop.engine.model, folder, weights)
        base = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
        untouched = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, folder)(input_ids=ids).logits
        bench.note(f"adapter {zero}", float((loaded - live).abs().max()))
        bench.note(f"adapter {zero} changes the base by", float((loaded - untouched).abs().max()))


def qlora_learns(bench: Bench, zero: str, method: str) -> None:
    overrides = [f"zero={zero}", f"method={method}", "model.dtype=bf16", "batch.max_steps=8", "optim.eps=1e-8"]
    loop = bench.loop(bench.config(*overrides, "optim.weight_decay=0"))
    loop.evaluate()  # on CPU, bitsandbytes lays 4-bit weights out anew at their first use: the same values
    before = _frozen_bytes(loop)
    losses = [loop.step(step).record["loss"] for step in range(8)]
    again = [loop.step(0).record["loss"]]  # the first batch once more
    bench.note(f"{method} {zero} losses", losses[:1] + again)
    bench.note(f"{method} {zero} base unchanged", before == _frozen_bytes(loop))


def _frozen_bytes(loop: Loop) -> list[int]:
    """A checksum of every frozen tensor, as this rank holds it."""
    sums = []
    for name, parameter in loop.engine.model.named_parameters():
        if name not in loop.engine.trainable_params:
            held = getattr(parameter, "ds_tensor", parameter).detach().contiguous()
            sums.append(int(held.reshape(-1).view(torch.uint8).to(torch.int64).sum()))
    return sums


def fp16_overflow_is_skipped(bench: Bench) -> None:
    loop = bench.loop(bench.config("zero=stage2", "model.dtype=fp16", "batch.max_steps=8"))
    loop.engine.optimizer.loss_scaler.cur_scale = 2.0**40  # any gradient overflows
    loop.engine.optimizer.loss_scaler.cur_hysteresis = 1
    start = gather_state_of(loop, "lora_B")
    record = loop.step(0).record
    bench.note("fp16 scale after overflow", record["loss_scale"])
    same = all(torch.equal(a, b) for a, b in zip(start, gather_state_of(loop, "lora_B"), strict=True))
    bench.note("fp16 overflow changed nothing", same)
    loop.engine.optimizer.loss_scaler.cur_scale = 2.0**8
    losses = [loop.step(step).record["loss"] for step in range(1, 8)] + [loop.step(1).record["loss"]]
    bench.note("fp16 losses", [losses[0], losses[-1]])


NO_DROPOUT = ("full", "ia3", "prompt", "prefix", "bottleneck")
# AdaLoRA takes its first ranks before the checkpoint, and more behind it.
RESUMED = [
    *([zero, "method=adalora", "method.tinit=1", "method.tfinal=1"] for zero in ("stage0", "stage2", "stage3")),
    *(["stage2", f"method={method}"] for method in ("dora", "ia3", "prompt", "prefix", "bottleneck")),
    ["stage2", "method=lora", "method.init=pissa"],
]


def gather_state_of(loop: Loop, part: str) -> list[Tensor]:
    return [p.detach().clone() for n, p in loop.engine.trainable_params.items() if part in n]


def resume_is_bit_identical(bench: Bench, zero: str, *overrides: str) -> None:
    """Six steps at once against three, a checkpoint, and three more in an engine that knows nothing."""
    folder = shared_folder()
    name = " ".join([zero, *overrides])
    keys = [f"zero={zero}", "batch.max_steps=6", "batch.micro_size=3", *overrides]
    has_dropout = not any(each.removeprefix("method=") in NO_DROPOUT for each in overrides)
    config = bench.config(*keys, *(["method.dropout=0.1"] if has_dropout else []))
    straight = bench.loop(config, folder)
    for step in range(3):
        straight.step(step)
    assert straight.checkpointer.save(3)
    for step in range(3, 6):
        straight.step(step)
    expected = _everything(straight)

    again = bench.loop(config, folder)
    first, _ = again.checkpointer.restore(find_resume_point(folder, "auto"))
    for step in range(first, 6):
        again.step(step)
    found = _everything(again)
    identical = set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)
    bench.note(f"resume {name}", {"first step": first, "identical": identical, "tensors": len(expected)})


def chunks_equal_one_call(bench: Bench, zero: str, *overrides: str) -> None:
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
    if bench.world.is_main:
        far = {n: float((states[1][n] - t).norm() / t.norm().clamp_min(1e-12)) for n, t in states[0].items()}
        bench.note(" ".join(["chunks", zero, *overrides]), max(far.values()))


def _everything(loop: Loop) -> dict[str, Tensor]:
    live = {f"live/{n}": t for n, t in gather_live(loop.engine, only_trainable=True).items()}
    ranks = {f"ranks/{n}": t for n, t in loop.engine.runtime.state().items()}
    return {**gather_state(loop.engine), **live, **ranks}


def resume_at_another_stage(bench: Bench) -> None:
    """The state, to the bit, in an engine of another ZeRO stage; another seed is refused."""
    folder = shared_folder()
    first = bench.loop(bench.config("zero=stage2"), folder)
    for step in range(2):
        first.step(step)
    first.checkpointer.save(2)
    expected = gather_state(first.engine)
    for zero in ("stage0", "stage1", "stage3", "stage2_offload", "stage3_offload"):
        other = bench.loop(bench.config(f"zero={zero}"), folder)
        other.checkpointer.restore(find_resume_point(folder, "auto"))
        found = gather_state(other.engine)
        bench.note(f"stage2 → {zero}", all(torch.equal(found[n], expected[n]) for n in expected))
    wrong = bench.loop(bench.config("run.seed=5"), folder)
    try:
        wrong.checkpointer.restore(find_resume_point(folder, "auto"))
    except CheckpointError as error:
        bench.note("another seed", str(error))


def generation_in_lockstep(bench: Bench) -> None:
    """Greedy answers under ZeRO-3, ranks with rows of unlike length and number, against one stock process."""
    loop = bench.loop(bench.config("zero=stage3", "eval.max_rows=7", "eval.batch_size=2", "generate.max_new_tokens=6"))
    loop.engine.eval()
    from trainer.evaluation.evaluate import _answers

    rows = loop.data.validation
    answers = [a for _, a, _ in _answers(loop.generator, rows, loop.config, bench.world)]
    if bench.world.is_main:
        stock = reference_model(resolve("tiny"), loop.config).eval()
        expected = []
        for example in rows.examples(range(len(rows))):
            prompt = torch.tensor([example["input_ids"][: example["prompt_length"]]])
            out = stock.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
            ids = [t for t in out[0, prompt.shape[1] :].tolist() if t not in loop.generator.end_ids]
            expected.append(loop.generator.decode(ids).strip())
        bench.note("generation", {"rows": len(answers), "equal": answers == expected})


def not_finite_is_named(bench: Bench, zero: str) -> None:
    """Rank 1 alone meets a NaN: every rank stops at that step, no tensor has changed."""
    loop = bench.loop(bench.config(f"zero={zero}"))
    loop.step(0)
    before = gather_state(loop.engine)
    if bench.world.rank == 1:
        loop.engine.loss = _Poisoned(loop.engine.loss)
    message: Any = None
    try:
        loop.step(1)
    except TrainingError as error:
        message = str(error)
    messages = bench.world.world_size * [None]
    torch.distributed.all_gather_object(messages, message)
    after = gather_state(loop.engine)
    bench.note(
        f"not finite {zero}", {"messages": messages, "unchanged": all(torch.equal(before[n], after[n]) for n in before)}
    )


def one_rank_cannot_write(bench: Bench) -> None:
    """Rank 1's disk is full: every rank hears of it, the run goes on, and the next checkpoint is there."""
    folder = shared_folder()
    loop, logged = bench.loop(bench.config("method=full", "zero=stage2"), folder), LoggedLines()
    loop.step(0)
    full = RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
    with patch("torch.save", side_effect=full) if bench.world.rank == 1 else nullcontext():
        lost = loop.checkpointer.save(1)
    loop.step(1)
    kept = loop.checkpointer.save(2)
    there = sorted(path.name for path in (folder / "checkpoints").iterdir())
    bench.note("full disk on rank 1", gather_objects({"saved": [lost, kept], "said": logged.lines, "there": there}))


class _Poisoned:
    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        return self.loss(forward, batch) * float("nan")


def main() -> None:
    bench = Bench()
    loss_equals_transformers(bench)
    for zero in ZERO:
        adapter_loads_in_stock_peft(bench, zero)
        resume_is_bit_identical(bench, zero)
        not_finite_is_named(bench, zero)
    for zero in ("stage0", "stage2", "stage3"):
        resume_is_bit_identical(bench, zero, "method=full")
    resume_is_bit_identical(bench, "stage2", "model.dtype=bf16")
    resume_is_bit_identical(bench, "stage3", "model.dtype=bf16")
    resume_is_bit_identical(bench, "stage0", "model.dtype=bf16")
    for overrides in RESUMED:
        resume_is_bit_identical(bench, *overrides)
    for zero in ZERO:
        chunks_equal_one_call(bench, zero)
    for zero in ("stage2", "stage3"):
        chunks_equal_one_call(bench, zero, "method=full")
    resume_at_another_stage(bench)
    one_rank_cannot_write(bench)
    generation_in_lockstep(bench)
    for zero in ("stage2", "stage3"):
        qlora_learns(bench, zero, "qlora")
    qlora_learns(bench, "stage2", "qlora_8bit")
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        fp16_overflow_is_skipped(bench)
    watch_whole_runs(bench)
    bench.finish()


if __name__ == "__main__":
    sys.exit(main())
