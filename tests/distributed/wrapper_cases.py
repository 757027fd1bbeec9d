"""On two ranks: multimodal wrappers, the text part trained, saved, and loaded by stock PEFT, against one plain process.

Tiny random wrappers with the tiny tokenizer beside them: LoRA on all linear layers of each, under the ZeRO stages in
turn; and every method on two of them, one with a sliding window, the other with positions of three dimensions. The
plain process gets the names of the layers from the table of wrappers, and where they stand from a regular expression of
its own.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.distributed.method_cases import METHODS, logits
from tests.helpers.reference import reference_base, reference_model, trained_reference, worst_distance
from tests.helpers.wrappers import WRAPPERS, tiny_wrapper
from trainer.config import TrainConfig
from trainer.distributed import process_group as distributed
from trainer.engine.whole_state import gather_live
from trainer.methods import load_adapter
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer

EVERY_METHOD = ("gemma3 wrapper", "qwen2_5_vl wrapper")


def cases() -> dict[str, tuple[str, list[str]]]:
    """Wrapper and overrides of every case, by its name. Gradient checkpointing changes from case to case."""
    out = {}
    for number, name in enumerate(WRAPPERS):
        saves = f"model.gradient_checkpointing={str(number % 2 == 0).lower()}"
        stage = (number + 2) % 4
        out[f"{name} lora {stage}"] = (name, ["method=lora", "method.r=4", f"zero=stage{stage}", saves])
    for name in EVERY_METHOD:
        out[f"{name} layers"] = (name, ["method=lora", "method.r=4", "method.layers=[1]", "zero=stage2"])
        virtual = ("prompt", "prefix") if name == "gemma3 wrapper" else ()  # the other's positions know of none
        for number, method in enumerate(("ia3", "bottleneck", "full", "adalora", *virtual)):
            out[f"{name} {method}"] = (name, [*METHODS[method], f"zero=stage{2 + number % 2}"])
    return out


def plain(name: str, folder: str, config: TrainConfig, total_steps: int) -> Any:
    """Stock PEFT on stock transformers, the layers named by the table."""
    layers = "" if config.method.layers is None else rf"layers\.({'|'.join(map(str, config.method.layers))})\."
    text_part = rf"(.*\.)?(language_model|text_model)\.(.*\.)?{layers}(.*\.)?"
    model = reference_model(folder, config, total_steps, f"{text_part}({'|'.join(sorted(WRAPPERS[name].linear))})")
    return train_only_text(model) if config.method.name == "full" else model


def train_only_text(base: Any) -> Any:
    for full, parameter in base.named_parameters():
        parameter.requires_grad_(".language_model." in full or full.startswith("lm_head"))
    return base


def save_models(bench: Bench, folder: Path) -> None:
    """A wrapper of each kind, small in its numbers: what is compared is the gradient, not what rounding does to a
    sharp softmax."""
    tokenizer = load_tokenizer(resolve("tiny"), bench.config().model)
    torch.manual_seed(0)
    for name in WRAPPERS if bench.world.is_main else ():
        sizes = {"vocab_size": len(tokenizer) + 8, "max_position_embeddings": 512, "initializer_range": 0.08}
        tiny_wrapper(name, **sizes).save_pretrained(folder / name.split()[0])
        tokenizer.save_pretrained(folder / name.split()[0])
    distributed.barrier()


def matches_plain_process(bench: Bench, shared: Path, name: str, overrides: list[str]) -> list[Any] | None:
    """Relative distance of the update and of the saved logits, which tensors are as they were, and whether tries were
    used."""
    folder = str(shared / name.split()[0])
    # Norms of queries and keys make gradients smaller yet than those that the bench's own eps is for.
    config = bench.config(*overrides, f"model.name_or_path={folder}", "batch.max_steps=3", "optim.eps=1e-3")
    loop = bench.loop(config)
    begun = gather_live(loop.engine, only_trainable=True)
    steps = loop.schedule.total_steps
    for step in range(steps):
        loop.step(step)
    is_full = config.method.name == "full"
    found, live = gather_weights(loop), gather_live(loop.engine, only_trainable=not is_full)
    if not bench.world.is_main:
        return None
    batches = reference_batches(loop, steps)
    model, expected = trained_reference(folder, config, batches, steps, partial(plain, name))
    # of a rank that AdaLoRA has pruned E is the zero that it began as
    untouched = [n for n, tensor in found.items() if torch.equal(tensor, begun[n]) and "lora_E" not in n]
    return [worst_distance(found, expected), reloaded(loop, live, model, folder), untouched, loop.packing.uses_trie]


def reloaded(loop: Any, live: dict[str, Tensor], model: Any, folder: str) -> float:
    """Relative distance of the logits: what was saved, read by stock PEFT or transformers, and the plain process."""
    expected = logits(model)
    with tempfile.TemporaryDirectory() as name:
        loop.engine.runtime.save(loop.engine.model, Path(name), live)
        found = logits(read_back(loop.config, folder, name))
    assert not torch.allclose(expected, logits(reference_base(folder, loop.config)), rtol=1e-3), "nothing was trained"
    return float((found - expected).norm() / expected.norm())


def read_back(config: TrainConfig, folder: str, saved: str) -> Any:
    if config.method.name == "full":
        return reference_base(saved, config)
    fresh = reference_base(folder, config)
    if config.method.name == "bottleneck":
        return load_adapter(fresh, Path(saved))
    model = PeftModel.from_pretrained(fresh, saved)
    if config.method.name not in ("prompt", "prefix"):  # PEFT takes their one tensor for unexpected
        result = model.load_adapter(saved, adapter_name="again")
        assert not [*result.missing_keys, *result.unexpected_keys], result
        model.delete_adapter("again")
    return model


def main() -> None:
    Bench().record_models(save_models, matches_plain_process, cases())


if __name__ == "__main__":
    main()
