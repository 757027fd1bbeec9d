"""What a run leaves for people and tools: metrics, summary, environment, the terminal, Weights & Biases.

The loop calls ``tracker.log(record)`` once a step with everything of that step merged, so that `metrics.jsonl` has one
line a step by construction. No torch here, and nothing here may stop a run: a full disk, a closed terminal, a missing
network or an exception of wandb is said once and the run goes on.
"""

from trainer.tracking.environment import redact, write_environment
from trainer.tracking.files import read_metrics, read_summary, write_atomically, write_summary
from trainer.tracking.tracker import Tracker

__all__ = [
    "Tracker",
    "read_metrics",
    "read_summary",
    "redact",
    "write_atomically",
    "write_environment",
    "write_summary",
]
