"""On two ranks: every architecture, trained, saved, and loaded by stock PEFT, against one plain process.

Tiny random models of each, with the tiny tokenizer beside them: LoRA on all linear layers under ZeRO-2 and ZeRO-3, and
other methods on the architectures whose layers are unlike Llama's. The plain process gets the names of the layers
from the table of architectures.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.distributed.method_cases import METHODS, logits
from tests.helpers.architectures import ARCHITECTURES, tiny
from tests.helpers.reference import reference_base, reference_model, trained_reference, worst_distance
from trainer.config import TrainConfig
from trainer.distributed import process_group as distributed
from trainer.engine.whole_state import gather_live
from trainer.methods import load_adapter, save_adapter
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer

# Their layers are unlike Llama's in name or in kind.
UNLIKE_LLAMA = ("gpt2", "gpt_neox", "gemma")
PADDED = {"gemma2": "its scores are capped"}  # the others are trained in tries


def cases() -> dict[str, tuple[str, list[str]]]:
    """Architecture and overrides of every case, by its name. Gradient checkpointing changes from case to case."""
    out = {}
    for number, name in enumerate(ARCHITECTURES):
        for stage in (2, 3):
            saves = f"model.gradient_checkpointing={str((number + stage) % 2 == 0).lower()}"
            out[f"{name} lora {stage}"] = (name, ["method=lora", "method.r=4", f"zero=stage{stage}", saves])
    for name in UNLIKE_LLAMA:
        for number, method in enumerate(("ia3", "bottleneck", "prompt")):
            out[f"{name} {method}"] = (name, [*METHODS[method], f"zero=stage{2 + number % 2}"])
    return out


def plain(name: str, folder: str, config: TrainConfig, total_steps: int) -> Any:
    """Stock PEFT on stock transformers, the layers named by the table."""
    method, row, peft = config.method, ARCHITECTURES[name], None
    if method.name == "lora":
        peft = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=sorted(row.linear))
    if method.name == "ia3":
        targets = sorted({*row.linear, row.down})
        peft = IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[row.down])
    if peft is None:
        return reference_model(folder, config, total_steps)
    base = reference_base(folder, config)
    torch.manual_seed(config.run.seed)
    return get_peft_model(base, peft)


def checkpoint_dir(parent: Path, name: str) -> Path:
    """A comma in a path would be several values to an override."""
    return parent / name.partition(",")[0]


def save_models(bench: Bench, folder: Path) -> None:
    """A model of each architecture, small in its numbers: what is compared is the gradient, not what rounding does to
    a sharp softmax."""
    config = bench.config()
    tokenizer = load_tokenizer(resolve("tiny"), config.model)
    torch.manual_seed(0)
    positions = {"gpt2": "n_positions"}
    for name in ARCHITECTURES if bench.world.is_main else ():
        sizes = {"vocab_size": len(tokenizer), positions.get(name, "max_position_embeddings"): 512}
        tiny(name, **sizes, initializer_range=0.08).save_pretrained(checkpoint_dir(folder, name))
        tokenizer.save_pretrained(checkpoint_dir(folder, name))
    distributed.barrier()


def matches_plain_process(bench: Bench, shared: Path, name: str, overrides: list[str]) -> list[Any] | None:
    """Relative distance of the update and of the saved adapter's logits, and whether tries were used."""
    folder = str(checkpoint_dir(shared, name))
    # Norms of queries and keys make gradients smaller yet than those that the bench's own eps is for.
    config = bench.config(*overrides, f"model.name_or_path={folder}", "batch.max_steps=3", "optim.eps=1e-4")
    loop = bench.loop(config)
    steps = loop.schedule.total_steps
    for step in range(steps):
        loop.step(step)
    found, live = gather_weights(loop), gather_live(loop.engine, only_trainable=True)
    if not bench.world.is_main:
        return None
    batches = reference_batches(loop, steps)
    model, expected = trained_reference(folder, config, batches, steps, partial(plain, name))
    return [worst_distance(found, expected), reloaded(loop, live, model, folder), loop.packing.uses_trie]


def reloaded(loop: Any, live: dict[str, torch.Tensor], model: Any, folder: str) -> float:
    """Relative distance of the logits: the saved adapter on a fresh base, and the plain process."""
    expected = logits(model)
    with tempfile.TemporaryDirectory() as name:
        save_adapter(loop.engine.model, Path(name), live, loop.engine.runtime.initial_weights)
        fresh = reference_base(folder, loop.config)
        stock = loop.config.method.name != "bottleneck"
        found = logits(PeftModel.from_pretrained(fresh, name) if stock else load_adapter(fresh, Path(name)))
    assert not torch.allclose(expected, logits(reference_base(folder, loop.config)), rtol=1e-3), "nothing was trained"
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    bench = Bench()
    shared = bench.shared_folder()
    save_models(bench, shared)
    each = {
        case: partial(matches_plain_process, shared=shared, name=name, overrides=overrides)
        for case, (name, overrides) in cases().items()
    }
    bench.record(each)


if __name__ == "__main__":
    main()
