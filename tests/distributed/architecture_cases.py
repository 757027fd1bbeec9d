"""On two ranks: every architecture, trained, saved, loaded by stock PEFT and merged, against one plain process.

Tiny random models of each, with the tiny tokenizer beside them: LoRA on all linear layers under ZeRO-2 or ZeRO-3 (some
with a state under both: their code reads weights past the layers that ZeRO-3 gathers), and other methods on the
architectures whose layers are unlike Llama's. The plain process gets the names of the layers from the table.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.distributed.bench import Bench, gather_weights, reference_batches
from tests.distributed.method_cases import METHODS, logits
from tests.helpers.architecture_table import TABLE
from tests.helpers.architectures import random_model
from tests.helpers.reference import reference_base, reference_model, trained_reference, worst_distance
from trainer.config import TrainConfig
from trainer.distributed import process_group as distributed
from trainer.engine.trie_obstacle import trie_obstacle
from trainer.engine.whole_state import gather_live, gather_state
from trainer.errors import CheckpointError, ConfigError
from trainer.merge.merge import merge
from trainer.methods import load_adapter, save_adapter
from trainer.methods.targets import left_out, target_names
from trainer.models.embedded import resolve
from trainer.models.loading import load_tokenizer

BOTH_STAGES = ("mamba", "jamba", "zamba2")
# Their layers are unlike Llama's in name or in kind.
UNLIKE_LLAMA = ("gpt2", "gpt_neox", "gemma")
# Normed queries and keys whose products are not scaled down: as made, rounding in fp32 moves its gradient by 4e-6.
SHARP = ("gemma4",)


def cases() -> dict[str, tuple[str, list[str]]]:
    """Architecture and overrides of every case, by its name. Gradient checkpointing changes from case to case."""
    out = {}
    for number, name in enumerate(TABLE):
        for stage in (2, 3) if name in BOTH_STAGES else (2 + number % 2,):
            saves = f"model.gradient_checkpointing={str((number // 2 + stage) % 2 == 0).lower()}"
            out[f"{name} lora {stage}"] = (name, ["method=lora", "method.r=4", f"zero=stage{stage}", saves])
    for name in UNLIKE_LLAMA:
        for number, method in enumerate(("ia3", "bottleneck", "prompt")):
            out[f"{name} {method}"] = (name, [*METHODS[method], f"zero=stage{2 + number % 2}"])
    return out


def plain(name: str, folder: str, config: TrainConfig, total_steps: int) -> Any:
    """Stock PEFT on stock transformers, the layers named by the table."""
    method, row, peft = config.method, TABLE[name], None
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
    return parent / name.replace(",", "").replace(" ", "_")


def save_models(bench: Bench, folder: Path) -> None:
    """A model of each architecture, small in its numbers: what is compared is the gradient, not what rounding does to
    a sharp softmax."""
    config = bench.config()
    tokenizer = load_tokenizer(resolve("tiny"), config.model)
    for name, row in TABLE.items() if bench.world.is_main else ():
        torch.manual_seed(0)
        sizes = {**dict.fromkeys(row.vocabularies, len(tokenizer)), row.positions: 512}
        model = random_model(row, **sizes, initializer_range=0.08)
        if name in SHARP:
            for layer in model.model.layers:
                layer.self_attn.q_norm.weight.data.mul_(0.25)
        model.save_pretrained(checkpoint_dir(folder, name))
        tokenizer.save_pretrained(checkpoint_dir(folder, name))
    distributed.barrier()


def matches_plain_process(bench: Bench, shared: Path, name: str, overrides: list[str]) -> dict[str, Any] | None:
    """What the test asserts of a case: relative distances from the plain process, and names."""
    folder = str(checkpoint_dir(shared, name))
    # Norms of queries and keys make gradients smaller yet than those that the bench's own eps is for.
    config = bench.config(*overrides, f"model.name_or_path={folder}", "batch.max_steps=3", "optim.eps=1e-4")
    loop = bench.loop(config)
    steps = loop.schedule.total_steps
    for step in range(steps):
        loop.step(step)
    found, live = gather_weights(loop), gather_live(loop.engine, only_trainable=True)
    moments = gather_state(loop.engine)
    if not bench.world.is_main:
        return None
    batches = reference_batches(loop, steps)
    model, expected = trained_reference(folder, config, batches, steps, partial(plain, name))
    base = reference_base(folder, config)
    return {
        "update": worst_distance(found, expected),
        "no gradient": [n for n, moment in moments.items() if n.startswith("exp_avg_sq/") and not moment.any()],
        "trie": loop.packing.uses_trie,
        "obstacle": trie_obstacle(loop.engine.model),
        "sets": {wanted: resolved(base, wanted) for wanted in ("attention_min", "attention", "all_linear")},
        "left out": sorted({next(p for p in full.split(".")[::-1] if not p.isdigit()) for full in left_out(base)}),
        **reloaded(loop, live, model, folder),
    }


def resolved(base: Any, wanted: str) -> list[str]:
    """The names that a set means; none where it is refused."""
    try:
        return target_names(base, wanted)
    except ConfigError:
        return []


def reloaded(loop: Any, live: dict[str, torch.Tensor], model: Any, folder: str) -> dict[str, Any]:
    """Relative distance of the logits: the saved adapter on a fresh base, the merged model, and the plain process."""
    expected = logits(model)
    config = loop.config
    assert not torch.allclose(expected, logits(reference_base(folder, config)), rtol=1e-3), "nothing was trained"
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name) / "adapter"
        save_adapter(loop.engine.model, adapter, live, loop.engine.runtime.initial_weights)
        fresh = reference_base(folder, config)
        stock = config.method.name != "bottleneck"
        again = PeftModel.from_pretrained(fresh, str(adapter)) if stock else load_adapter(fresh, adapter)
        out: dict[str, Any] = {"logits": float((logits(again) - expected).norm() / expected.norm())}
        if config.method.name != "lora":
            return out
        written = load_file(adapter / "adapter_model.safetensors")
        out["odd keys"] = sorted(set(get_peft_model_state_dict(again)) ^ set(written))
        return out | merged(config, folder, adapter, Path(name) / "merged")


def merged(config: TrainConfig, folder: str, adapter: Path, to: Path) -> dict[str, Any]:
    """The distance that a merge was verified by, or why there is none."""
    tokenizer = load_tokenizer(folder, config.model)
    try:
        result = merge(
            lambda: load_adapter(reference_base(folder, config), adapter),
            tokenizer,
            [[5, 6, 7, 8, 9, 10, 11]],
            to,
            lambda path, _: reference_base(str(path), config),
            lambda _: "",
        )
    except CheckpointError as error:
        return {"merge refused": str(error)}
    return {"merged": result.distance, "effect": result.base_distance}


def main() -> None:
    Bench().record_models(save_models, matches_plain_process, cases())


if __name__ == "__main__":
    main()
