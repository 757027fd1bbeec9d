"""Say what ``--help`` shows beside the options: in which panel a verb stands, examples, the groups of the config."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand

from trainer.tracking.logs import terminal_width

TRAIN, LOOK, CHECK, USE, JOBS = "Train", "Look at what came out", "Check first", "Use a run", "Runs as jobs"
PANELS = {
    **dict.fromkeys(("train", "sweep", "compare"), TRAIN),
    **dict.fromkeys(("runs", "show", "report"), LOOK),
    **dict.fromkeys(("config", "doctor", "data", "fetch", "version"), CHECK),
    **dict.fromkeys(("eval", "generate", "chat", "merge"), USE),
    **dict.fromkeys(("status", "logs", "cancel", "slurm-script"), JOBS),
}
# As they must be typed, each in one line of 80 columns.
EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": (
        "afina train experiment=demo",
        "afina train method=qlora rank=large data=alpaca data.path=my.jsonl",
        "afina train launch=torchrun 'method.target_modules=[q_proj,v_proj]'",
    ),
    "sweep": (
        "afina sweep experiment=demo method.r=8,16 method.alpha=16,32",
        "afina sweep sweep=learning_rate sweep.sampler=random sweep.trials=20",
    ),
    "compare": (
        "afina compare experiment=demo compare.rows=200",
        "afina compare 'compare.methods=[full,\"lora r=8\",qlora]'",
    ),
    "runs": ("afina runs",),
    "show": ("afina show demo",),
    "report": ("afina report runs/demo", "afina report runs/my-sweep --to page.html"),
    "config": (
        "afina config method=qlora rank=large",
        "afina config --keys learning rate",
        "afina config --config runs/demo/config.yaml method.r=16",
    ),
    "doctor": ("afina doctor", "afina doctor experiment=qlora_7b_1gpu", "afina doctor --matrix"),
    "data": ("afina data data=alpaca data.path=my.jsonl --html rows.html",),
    "fetch": ("afina fetch smollm2_135m",),
    "eval": ("afina eval demo 'eval.metrics=[loss,exact_match]'",),
    "generate": ('afina generate demo "Is this sarcastic?" generate.max_new_tokens=20',),
    "chat": ("afina chat demo", "afina chat demo --no-adapter --bits 4"),
    "merge": ("afina merge demo --to models/demo",),
    "status": ("afina status", "afina status demo"),
    "logs": ("afina logs demo --follow",),
    "cancel": ("afina cancel demo",),
    "slurm-script": ("afina slurm-script launch.partition=gpu > my.sbatch",),
    "version": ("afina version",),
}


class Verb(TyperCommand):
    """A verb whose help ends with examples; that of ``train`` with the groups of the config, too."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        super().format_help(ctx, formatter)
        print("\n".join([" Examples:", *(f"   {example}" for example in EXAMPLES[self.name or ""])]))
        if self.name == "train":
            print(f"\n{config_groups(terminal_width())}")


def config_groups(width: int) -> str:
    """Return every group with its options, wrapped."""
    from trainer.config import groups

    lines = [" Groups of the config, as GROUP=OPTION; `afina config --keys` explains keys:"]
    pad = max(map(len, groups())) + 5
    for name, options in groups().items():
        head = f"   {name}".ljust(pad)
        lines += textwrap.wrap(", ".join(options), width, initial_indent=head, subsequent_indent=" " * pad)
    return "\n".join(lines)
