"""afina beside TRL's SFTTrainer and beside the plain Trainer that pads every row to one length.

python benchmarks/throughput.py [--rounds 3] [--steps 5] [--only soc_codes]

Same machine, minute, model (SmolLM2-135M, bf16), LoRA (r=16 on q, k, v, o), rows in the same order, global batch,
AdamW and learning rate. Each run is a process of its own; its window opens with the loaded model and closes with the
saved adapter. The systems take turns, forth and back; medians over the rounds. TRL is tried with 4 and 16 rows a
forward, with and without autocast, and measured at its fastest. Writes throughput.md and throughput.json beside this
file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks._rows import prepare_rows, rows_in_training_order, save_rows
from trainer.models.embedded import fetch
from trainer.tracking.logs import configure_logging

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GLOBAL_SIZE = 64
RATE = 2e-4
MEDICAL_ROWS = ROOT / "examples" / "medical" / "medical.jsonl"
MEDICAL = "Answer the medical question with the letter of the right option."
SHORT = 400  # characters of a medical question with its options: leaves out the few very long ones
SYSTEMS = ("afina", "trl", "trainer")
NAMES = {"afina": "afina", "trl": "TRL SFTTrainer", "trainer": "Trainer, padded to the longest"}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=list(data_sets()), default=None)
    arguments = parser.parse_args()
    configure_logging()
    model = str(fetch("smollm2_135m"))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else data_sets():
            results[name] = measure(name, model, Path(folder), arguments.rounds, arguments.steps)
    text = table(results, arguments.rounds, arguments.steps)
    print(text)
    if arguments.only is None:  # the table is of one run
        (HERE / "throughput.md").write_text(text)
        (HERE / "throughput.json").write_text(json.dumps(results, indent=1) + "\n")


def data_sets() -> dict[str, tuple[str, list[dict[str, str]], list[str]]]:
    """Name -> what it is, Alpaca rows, and overrides: how they are rendered, and tokens a forward.

    More tokens a forward would be faster; so many keep afina's memory below TRL's.
    """
    soc = [json.loads(line) for line in (HERE / "data" / "soc_codes.jsonl").read_text().splitlines()]
    medical = [as_alpaca(json.loads(line)) for line in MEDICAL_ROWS.read_text().splitlines()]
    medical = [row for row in medical if len(row["input"]) <= SHORT]
    bare = [{"instruction": f"{row['input']}\nAnswer: ", "output": row["output"]} for row in medical]
    return {
        "soc_codes": ("a long instruction, short answers", soc, ["data.alpaca_role=system", "batch.micro_tokens=1536"]),
        "medical": (
            "multiple choice, a short instruction",
            medical,
            ["data.alpaca_role=system", "batch.micro_tokens=1024"],
        ),
        "medical, bare": (
            "the same questions, nothing before them",
            bare,
            ["data.template=plain", "batch.micro_tokens=1024"],
        ),
    }


def as_alpaca(row: dict[str, Any]) -> dict[str, str]:
    """A multiple-choice row with its options lettered."""
    options = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(row["options"]))
    return {"instruction": MEDICAL, "input": f"{row['question']}\n{options}", "output": chr(65 + row["answer"])}


def measure(name: str, model: str, folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """All runs on one data set."""
    _, rows, rendering = data_sets()[name]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = afina_overrides(source, folder, steps) + rendering
    found = write_rows(folder / "rows.npz", overrides, steps)
    tried = {}
    for micro_size in (4, 16):
        for autocast in (True, False):
            settings = peer_settings(model, folder, 2, micro_size, autocast)
            tried[micro_size, autocast] = run("trl", folder, settings, overrides)["useful_tokens_per_second"]
    micro_size, autocast = max(tried, key=tried.__getitem__)
    settings = peer_settings(model, folder, steps, micro_size, autocast)
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for turn in range(rounds):
        for system in SYSTEMS if turn % 2 == 0 else reversed(SYSTEMS):
            runs[system].append(run(system, folder, settings, overrides))
    best = f"{micro_size} rows a forward, {'with' if autocast else 'without'} autocast"
    return {**found, "trl_at": best, "runs": runs}


def afina_overrides(source: Path, folder: Path, steps: int) -> list[str]:
    """The run as a user would type it."""
    return [
        *(f"data.path={source}", "data.validation=0", "model=smollm2_135m", "model.dtype=bf16", "zero=stage2"),
        *("method=lora", "method.r=16", "method.target_modules=attention", f"optim.learning_rate={RATE}"),
        *("schedule=constant", "schedule.warmup_ratio=0", f"batch.global_size={GLOBAL_SIZE}"),
        *(f"batch.max_steps={steps}", "batch.epochs=100", "log=off", "checkpoint.every_steps=0"),
        *(f"run.dir={folder / 'runs'}", "run.name=measured", "run.overwrite=true"),
    ]


def peer_settings(model: str, folder: Path, steps: int, micro_size: int, autocast: bool) -> dict[str, Any]:
    """Return the settings of ``_peer.py``."""
    return {
        "model": model,
        "r": 16,
        "alpha": 32,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "output": str(folder / "peer"),
        "micro_size": micro_size,
        "global_size": GLOBAL_SIZE,
        "steps": steps,
        "learning_rate": RATE,
        "schedule": "constant",
        "autocast": autocast,
    }


def write_rows(path: Path, overrides: list[str], steps: int) -> dict[str, float]:
    """Write token ids and loss masks of every step, in order, for the peers; return what the rows are like."""
    config, _, data = prepare_rows(overrides)
    rows = rows_in_training_order(config, data, steps)
    save_rows(path, rows)
    shortest = min(len(r.ids) for r in rows)
    alike = np.all(np.stack([r.ids[:shortest] for r in rows]) == rows[0].ids[:shortest], axis=0)
    shared = int(np.argmin(alike)) if not alike.all() else shortest
    return {"tokens_a_row": sum(len(r.ids) for r in rows) / len(rows), "shared_by_all": shared}


def run(system: str, folder: Path, settings: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """One process, one result."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    (folder / "settings.json").write_text(json.dumps(settings))
    if system == "afina":
        command = [HERE / "_afina.py", result, *overrides]
    else:
        command = [HERE / "_peer.py", system, folder / "rows.npz", folder / "settings.json", result]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not result.exists():
        raise SystemExit(f"{system} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    found = json.loads(result.read_text())
    found["useful_tokens_per_second"] = found["useful_tokens"] / found["seconds"]
    print(f"{system}: {found['useful_tokens_per_second']:.0f} useful tokens/s", flush=True)
    return found


def table(results: dict[str, Any], rounds: int, steps: int) -> str:
    """Markdown: one row a system and data set; ratios to TRL in the same rounds."""
    lines = [
        f"SmolLM2-135M, bf16, LoRA r=16 on q, k, v, o; {os.cpu_count()} cores; {steps} steps of {GLOBAL_SIZE} rows,",
        f"from loaded model to saved adapter; medians of {rounds} rounds in which the systems take turns.",
        "",
        "| data (tokens a row, shared by all) | system | useful tokens/s | beside TRL | peak memory | final loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        share = f"{name}: {data_sets()[name][0]} ({found['tokens_a_row']:.0f}, {found['shared_by_all']})"
        for system in SYSTEMS:
            runs = found["runs"][system]
            speeds = [r["useful_tokens_per_second"] for r in runs]
            beside = median(
                mine / trl["useful_tokens_per_second"] for mine, trl in zip(speeds, found["runs"]["trl"], strict=True)
            )
            memory = median(r["peak_memory_bytes"] for r in runs) / 2**30
            loss = median(r["losses"][-1] for r in runs)
            title = f"{NAMES[system]} ({found['trl_at']})" if system == "trl" else NAMES[system]
            bold = "**" if system == "afina" else ""
            lines.append(
                f"| {share if system == 'afina' else ''} | {title} | {median(speeds):.0f} | {bold}{beside:.1f} ×{bold} "
                f"| {memory:.1f} GiB | {loss:.4f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
