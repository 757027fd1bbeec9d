"""What a run leaves for people and tools: metrics, summary, environment, logged lines, Weights & Biases.

The loop calls ``tracker.log(record)`` once a step with everything of that step merged, so that `metrics.jsonl` has one
line a step by construction. No torch here, and nothing here may stop a run: a full disk, a closed terminal, a missing
network or an exception of wandb is logged once and the run goes on.
"""
