"""What is learned: afina's LoRA beside TRL's on the same rows in the same order, and beside all weights trained.

python benchmarks/quality.py [--steps 32] [--tried 6]

SmolLM2-135M in bf16 on soc_codes.jsonl, 100 of its 600 rows held out. LoRA (r=16 on all linear layers) starts from the
same values in both; global batch, AdamW, cosine schedule and learning rate are the same. Full fine-tuning by afina
takes the best of three rates on fewer steps. All final models, and the base, are scored by one scorer that is none of
theirs (_score.py). Writes quality.md and quality.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._rows import prepare_rows, rows_in_training_order, save_rows
from benchmarks.throughput import HERE, ROOT, run
from trainer.models.embedded import fetch
from trainer.tracking.logs import configure_logging

GLOBAL_SIZE = 16
HELD_OUT = 100
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = ["method=lora", "method.r=16", "method.target_modules=all_linear"]
# On 8 updates better than 5e-4 and 1e-3 (held-out loss 2.74, 3.60 and 3.08): so short a run wants a high rate.
LORA_RATE = 2e-3
FULL_RATES = (1e-4, 3e-4, 1e-3)
NAMES = {
    "base": "base model",
    "afina": "afina, LoRA",
    "trl": "TRL SFTTrainer, LoRA",
    "full": "afina, all weights",
}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--tried", type=int, default=6, help="steps on which a rate is tried")
    arguments = parser.parse_args()
    configure_logging()
    with tempfile.TemporaryDirectory() as name:
        found = measure(str(fetch("smollm2_135m")), Path(name), arguments.steps, arguments.tried)
    text = table(found)
    print(text)
    (HERE / "quality.md").write_text(text)
    (HERE / "quality.json").write_text(json.dumps(found, indent=1) + "\n")


def measure(model: str, folder: Path, steps: int, tried: int) -> dict[str, Any]:
    """All runs, all scores."""
    write_rows(folder, steps)
    found: dict[str, Any] = {"steps": steps, "tried_steps": tried, "runs": {}}
    found["runs"]["base"] = score(model, "none", folder)
    found["tried"] = {rate: train("full", rate, tried, model, folder)["loss"] for rate in FULL_RATES}
    full_rate = min(found["tried"], key=found["tried"].__getitem__)
    found["rates"] = {"afina": LORA_RATE, "trl": LORA_RATE, "full": full_rate}
    found["runs"]["afina"] = train("lora", LORA_RATE, steps, model, folder)
    settings = peer_settings(model, folder, steps)
    trained = run("trl", folder, settings, [])
    found["runs"]["trl"] = {**score(model, settings["output"], folder), **trained}
    found["runs"]["full"] = train("full", full_rate, steps, model, folder)
    return found


def train(method: str, rate: float, steps: int, model: str, folder: Path) -> dict[str, Any]:
    """One training by afina, scored."""
    trained = run("afina", folder, {}, afina_overrides(method, rate, steps, folder))
    final = folder / "runs" / "measured"
    where = (str(final / "model"), "none") if method == "full" else (model, str(final / "adapter"))
    return {**score(*where, folder), **trained}


def afina_overrides(method: str, rate: float, steps: int, folder: Path) -> list[str]:
    """The run as a user would type it."""
    return [
        *(f"data.path={HERE / 'data' / 'soc_codes.jsonl'}", f"data.validation={HELD_OUT}", "data.alpaca_role=system"),
        *("model=smollm2_135m", "model.dtype=bf16", "zero=stage2", "eval.before=false", "eval.max_rows=8"),
        *(LORA if method == "lora" else ["method=full"]),
        *(f"optim.learning_rate={rate}", "schedule=cosine", "schedule.warmup_ratio=0"),
        *(f"batch.global_size={GLOBAL_SIZE}", "batch.micro_tokens=1536", f"batch.max_steps={steps}"),
        *("batch.epochs=100", "log=off", "checkpoint.every_steps=0"),
        *(f"run.dir={folder / 'runs'}", "run.name=measured", "run.overwrite=true"),
    ]


def peer_settings(model: str, folder: Path, steps: int) -> dict[str, Any]:
    """Return the settings of ``_peer.py``: a whole global batch a forward, under autocast, where TRL is fastest."""
    return {
        "model": model,
        "r": 16,
        "alpha": 32,
        "targets": TARGETS,
        "output": str(folder / "peer"),
        "micro_size": GLOBAL_SIZE,
        "global_size": GLOBAL_SIZE,
        "steps": steps,
        "learning_rate": LORA_RATE,
        "schedule": "cosine",
        "autocast": True,
    }


def write_rows(folder: Path, steps: int) -> None:
    """Write token ids and loss masks as afina prepares them: of every step, for TRL; held out, for the scorer."""
    config, _, data = prepare_rows(afina_overrides("lora", LORA_RATE, steps, folder))
    assert len(data.validation) == HELD_OUT, f"{len(data.validation)} rows are held out"
    save_rows(folder / "rows.npz", rows_in_training_order(config, data, steps))
    save_rows(folder / "held.npz", data.validation.tokens(range(HELD_OUT)))


def score(model: str, adapter: str, folder: Path) -> dict[str, float]:
    """The held-out loss, in a process of its own."""
    result = folder / "score.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, HERE / "_score.py", model, adapter, folder / "held.npz", result]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(result.read_text())
    print(f"held-out loss {found['loss']:.4f}", flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    runs, steps = found["runs"], found["steps"]
    rows = 600 - HELD_OUT
    lines = [
        f"SmolLM2-135M, bf16, soc_codes; {steps} updates of {GLOBAL_SIZE} rows, {steps * GLOBAL_SIZE / rows:.1f} times "
        f"over {rows} rows. (What it costs is in throughput.md.)",
        f"Held-out loss a label token ({HELD_OUT} rows, {runs['base']['label_tokens']} label tokens), by plain "
        "transformers in fp32.",
        "",
        "| trained by | learning rate | held-out loss | beside TRL |",
        "|---|---|---|---|",
    ]
    for name, title in NAMES.items():
        one = runs[name]
        beside = f"{100 * (one['loss'] / runs['trl']['loss'] - 1):+.1f} %"
        rate = "" if name == "base" else f"{found['rates'][name]:g}"
        lines.append(f"| {title} | {rate} | {one['loss']:.4f} | {beside} |")
    tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in found["tried"].items())
    lines += ["", f"Rates tried for all weights on {found['tried_steps']} updates, held-out loss: {tried}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
