"""What a run leaves for people and tools: metrics, summary, environment, logged lines, and its trackers.

The loop calls ``tracker.log(record)`` once a step with everything of that step merged, so that `metrics.jsonl` has one
line a step by construction. No torch here, and nothing here may stop a run: a full disk, a closed terminal, a missing
network or an exception of a tracker is logged once and the run goes on.
"""
