"""Write run, sweep and comparison folders as training leaves them, with curves that look like those of real runs."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trainer.config import load, to_yaml

BEGIN = datetime(2026, 3, 1, 9, 0, tzinfo=UTC)
BASE_LOSS = 3.2488


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a run went: its evaluation loss falls from ``BASE_LOSS`` to ``final``; ``status=None``: still going."""

    final: float = 0.3
    steps: int = 300
    status: str | None = "finished"
    seed: int = 0
    begin_minutes: float = 0.0
    peak_gib: float = 2.4
    step_seconds: float = 1.7
    restarts: Sequence[int] = ()
    skipped: Sequence[int] = ()
    error: str | None = None
    samples: bool = True
    exact_match: float | None = None
    trainable: int = 2_442_240

    @property
    def done(self) -> int:
        return self.steps if self.status in ("finished", "preempted") else int(self.steps * 0.6)

    @property
    def before(self) -> dict[str, float]:
        scores = {"eval_loss": BASE_LOSS, "eval_perplexity": math.exp(BASE_LOSS)}
        return scores | ({} if self.exact_match is None else {"exact_match": 0.0})


def write_run(folder: Path, overrides: Sequence[str] = (), **course: Any) -> Path:
    """Write a run folder whose run went as the fields of :class:`Course` say."""
    run = Course(**course)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load(["debug=tiny", f"run.name={folder.name}", *overrides])))
    log = Log(BEGIN + timedelta(minutes=run.begin_minutes))
    lines = _train(run, folder, log)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if run.status == "finished":
        log.write(f"eval_loss: {BASE_LOSS:.4f} → {run.final:.4f}")
        log.write(f"finished {run.steps} steps in {6 + run.steps * run.step_seconds:.0f} s: {folder}")
        (folder / "adapter").mkdir(exist_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * (run.trainable // 100))
    elif run.status == "preempted":
        log.write(f"stopped on request after step {run.done}; the same command resumes there")
    (folder / "log.txt").write_text("".join(log.lines))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if run.status is not None:
        (folder / "summary.json").write_text(json.dumps(_summary(run, lines[-1])))
    return folder


def _train(run: Course, folder: Path, log: Log) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the log is written on the way."""
    chance = random.Random(run.seed)
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, **run.before}]
    log.start(folder, 0)
    if run.samples:
        log.samples("I cannot tell whether this is sarcastic, but I can")
    log.write(f"step 0/{run.steps} eval_loss {BASE_LOSS:.4g}")
    for step in range(1, run.done + 1):
        log.pass_seconds(run.step_seconds)
        line = {"step": step, "epoch": step / run.steps, "elapsed_seconds": 6 + step * run.step_seconds}
        if step in run.skipped:
            log.write(f"warning: the loss of step {step} is not finite; the run goes on without step {step}")
            lines.append({**line, "skipped_steps": 1 + list(run.skipped).index(step)})
            continue
        line |= _step(run, step, chance)
        if run.samples and "eval_loss" in line:
            log.samples("yes" if step == run.steps else "Yes, it is")
        log.write(f"step {step}/{run.steps} loss {line['loss']:.3f}")
        lines.append(line)
        if step in run.restarts:
            if run.restarts.index(step) % 2 == 0:
                log.write(f"stopped on request after step {step}; the same command resumes there")
            log.pass_seconds(240)
            log.start(folder, step)
    return lines


def _step(run: Course, step: int, chance: random.Random) -> dict[str, Any]:
    """What a step logs, with its evaluation where one is due."""
    share = 1 - math.exp(-5 * step / run.steps)
    level = BASE_LOSS + (run.final - BASE_LOSS) * share
    line: dict[str, Any] = {
        "loss": level * math.exp(chance.gauss(0, 0.16)),
        "grad_norm": 0.4 + 3 * (1 - share) * math.exp(chance.gauss(0, 0.3)),
        "learning_rate": 2e-4 * min(1, step / 9) * (0.5 + 0.5 * math.cos(math.pi * step / run.steps)),
        "label_tokens": 48,
        "useful_tokens": 800 + chance.randrange(80),
        "computed_tokens": 455,
        "step_seconds": run.step_seconds,
        "data_seconds": 0.01,
        "peak_memory_bytes": int((run.peak_gib - 0.2 * math.exp(-step / 20)) * 2**30),
    }
    line["useful_tokens_per_second"] = line["useful_tokens"] / run.step_seconds * math.exp(chance.gauss(0, 0.05))
    if step % max(1, run.steps // 8) == 0 or step == run.steps:
        line["eval_loss"] = run.final if step == run.steps else level * (1 + 0.01 * chance.gauss(0, 1))
        line["eval_perplexity"] = math.exp(line["eval_loss"])
        if run.exact_match is not None:
            line["exact_match"] = run.exact_match * share if step < run.steps else run.exact_match
    return line


def _summary(run: Course, last: dict[str, Any]) -> dict[str, Any]:
    before = {f"{name}_before": value for name, value in run.before.items()}
    scores = {name: last.get(name) for name in run.before}
    return {
        "status": run.status,
        "steps": run.done,
        "wall_seconds": 6 + run.done * run.step_seconds,
        "trainable_parameters": run.trainable,
        "total_parameters": 136_957_248,
        "train_loss": last.get("loss"),
        "metrics": {**scores, **before} if run.status == "finished" else {},
        "best_step": None,
        "skipped_steps": len(run.skipped),
        "stopped_early": None,
        "error": None if run.error is None else {"kind": "TrainingError", "message": run.error, "rank": 0},
    }


class Log:
    """A `log.txt` in the making."""

    def __init__(self, begin: datetime) -> None:
        self.now = begin
        self.lines: list[str] = []

    def pass_seconds(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def write(self, text: str) -> None:
        self.lines.append(f"{self.now.isoformat(timespec='seconds')} {text}\n")

    def start(self, folder: Path, step: int) -> None:
        self.write("data: 1,200 rows to train on, 256 held out, from headlines.jsonl")
        self.write("tokens: 122,480; a row min/median/95 %/max 71 103 127 132; 3,600 are in the loss")
        self.write("warning: an earlier row is repeated in 2 rows → remove them (headlines.jsonl:1940)")
        self.write(
            "model: smollm2_135m in float32 on 1 × cpu, ZeRO stage 2; trained 2,442,240 of 136,957,248 parameters"
        )
        self.write("packing: trie, verified on 4 rows against padded (losses within 0.0e+00 in float32)")
        self.write(f"run: {folder}" + (f", resumed after step {step}" if step else ""))

    def samples(self, answer: str) -> None:
        blocks = []
        for number, headline in enumerate(("bill moyers' departure from tv leaves a huge hole", "area man wins"), 1):
            prompt = f"user\nIs this news headline sarcastic? Answer yes or no.\n\n{headline}\nassistant\n"
            fields = (("prompt", prompt), ("reference", "yes" if number == 2 else "no"), ("answer", answer))
            shown = [f"  {name:<9}  {text}".replace("\n", "\n" + " " * 13) for name, text in fields]
            blocks.append("\n".join([f"sample {number}", *shown]))
        self.write("\n".join(blocks))


ENVIRONMENT = {
    "written": BEGIN.isoformat(),
    "command": ["python", "-m", "trainer.train", "experiment=demo"],
    "python": "3.11.7",
    "hosts": ["node-1"],
    "devices": ["NVIDIA H100 80GB HBM3"],
    "world_size": 1,
    "git": {"commit": "0123abc", "changed": False},
    "packages": {
        "afina": "0.3.0",
        "torch": "2.13.0",
        "deepspeed": "0.19.8",
        "transformers": "5.23.0",
        "peft": "0.21.2",
    },
}


def write_sweep(
    folder: Path,
    ranks: Sequence[int] = (4, 8, 16, 32, 64),
    alphas: Sequence[int] = (8, 16, 32, 64),
    seeds: Sequence[int] = (0,),
    rates: Sequence[float] = (),
    steps: int = 300,
) -> Path:
    """Write a sweep of rank × alpha (× learning rate × seed); its best is r=16 alpha=32 at 2e-4."""
    rows, minutes = [], 0.0
    for r in ranks:
        for alpha in alphas:
            for rate in rates or (2e-4,):
                for seed in seeds:
                    distance = (
                        abs(math.log2(r / 16)) + 1.2 * abs(math.log2(alpha / 32)) + 2 * abs(math.log10(rate / 2e-4))
                    )
                    noise = random.Random(f"{r} {alpha} {seed}").gauss(0, 0.006)
                    name = f"r{r}_alpha{alpha}" + (f"_learning_rate{rate}" if rates else "")
                    name += f"_seed{seed}" if len(seeds) > 1 else ""
                    keys = {"method.r": r, "method.alpha": alpha, "optim.learning_rate": rate, "run.seed": seed}
                    write_run(
                        folder / name,
                        [f"{key}={value}" for key, value in keys.items()],
                        final=0.2249 + 0.021 * distance + noise,
                        steps=steps,
                        seed=r + alpha + seed,
                        begin_minutes=minutes,
                        peak_gib=2.1 + r / 60 + seed / 100,
                        step_seconds=1.5 + r / 90,
                        trainable=152_640 * r,
                    )
                    minutes += steps * (1.5 + r / 90) / 60 + 0.4
                    shown = {"method.r": r, "method.alpha": alpha}
                    shown |= {"optim.learning_rate": rate} if rates else {}
                    shown |= {"run.seed": seed} if len(seeds) > 1 else {}
                    rows.append(
                        {"rank": "", **shown, "status": "finished", "folder": f"runs/{folder.name}/{name}", "error": ""}
                    )
    write_csv(folder / "sweep.csv", rows)
    return folder


COMPARED = {
    "full": (0.2112, 9.6, 3.1, 136_957_248, ["method=full"]),
    "lora r=8": (0.2391, 2.5, 1.6, 1_221_120, ["method.r=8"]),
    "lora r=16": (0.2249, 2.6, 1.7, 2_442_240, ["method.r=16"]),
    "lora r=64": (0.2281, 2.9, 1.9, 9_768_960, ["method.r=64"]),
    "qlora": (0.2402, 1.6, 2.6, 2_442_240, ["method=qlora"]),
    "dora": (0.2198, 3.4, 2.4, 2_512_000, ["method=dora"]),
    "ia3": (0.4121, 2.2, 1.5, 92_000, ["method=ia3"]),
    "prompt": (1.1031, 2.7, 1.8, 11_520, ["method=prompt"]),
}


def write_comparison(folder: Path) -> Path:
    """Write a comparison of eight methods, with one that was refused and one that failed."""
    rows: list[dict[str, Any]] = [{"method": "no training", "status": "base", "tried": "{}", "folder": "", "error": ""}]
    for number, (method, (loss, peak, seconds, trainable, overrides)) in enumerate(COMPARED.items()):
        name = method.replace(" ", "-").replace("=", "")
        write_run(
            folder / name,
            overrides,
            final=loss,
            peak_gib=peak,
            step_seconds=seconds,
            trainable=trainable,
            seed=number,
            steps=200,
            begin_minutes=8 * number,
            exact_match=round(0.95 - loss / 2, 4),
        )
        tried = json.dumps({"0.0001": loss + 0.1, "0.0002": loss + 0.05}) if number == 1 else "{}"
        place = {"status": "finished", "tried": tried, "folder": f"runs/{folder.name}/{name}", "error": ""}
        rows.append({"method": method, **place})
    write_run(
        folder / "adalora",
        ["method=adalora"],
        steps=200,
        status="failed",
        begin_minutes=70,
        error="out of memory: 3 GiB",
    )
    place = {"tried": "{}", "folder": f"runs/{folder.name}/adalora", "error": "out of memory: 3 GiB"}
    rows.append({"method": "adalora", "status": "failed", **place})
    why = "method.dora=true: in 8 bits the scales are not what DoRA needs"
    rows.append({"method": "dora bits=8", "status": "refused", "tried": "{}", "folder": "", "error": why})
    write_csv(folder / "compare.csv", rows)
    return folder


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
