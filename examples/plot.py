"""Draw a run's loss: ``python examples/plot.py runs/demo examples/headlines/demo.svg``."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from trainer.tracking import read_metrics


def main(run: Path, picture: Path) -> None:
    records = read_metrics(run)
    steps = [r for r in records if "loss" in r]
    scored = [r for r in records if "eval_loss" in r]
    plt.rcParams["svg.hashsalt"] = "afina"  # the same run gives the same file
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#7aa6c2", linewidth=0.9, label="training")
    axes.plot(
        [r["step"] for r in scored],
        [r["eval_loss"] for r in scored],
        "o",
        color="#b3432b",
        markersize=7,
        label="held out, before and after",
    )
    for r in scored:
        note = f"{r['eval_loss']:.2f}, {r['exact_match']:.0%} of answers right"
        left = r["step"] < len(steps) / 2
        axes.annotate(
            note,
            (r["step"], r["eval_loss"]),
            xytext=(10, 0) if left else (0, 14),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
        )
    axes.set(xlabel="step", ylabel="loss a label token (nats)", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
