"""``afina compare`` for real: interrupted, started again, a table and a picture."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.processes import afina, stop_tree

KEYS = [
    *("compare", "debug=tiny", "run.name=c", "compare.rows=32", "eval.metrics=[loss,exact_match]"),
    "compare.methods=[full,'lora r=4','dora bits=8','prompt virtual_tokens=4']",
    "optim.learning_rate=0.01",
]


def test_interrupted_and_started_again(tiny_model: Path, tmp_path: Path) -> None:
    del tiny_model
    script = Path(sys.executable).with_name("afina")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    process = subprocess.Popen([script, *KEYS], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        first, second = (tmp_path / "runs" / "c" / name for name in ("full", "lora-r4"))
        end = time.monotonic() + 240
        while not second.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert second.exists(), "the second method was not reached"
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
    finally:
        stop_tree(process)
    summary = json.loads((first / "summary.json").read_text())
    written = (first / "summary.json").stat().st_mtime_ns
    # stopped while it was saving, or so late that it had finished: then the third is what was stopped
    assert code in (75, 143), code
    assert summary["status"] == "finished"

    done = afina(*KEYS, cwd=tmp_path)
    assert "[1/4] full: finished before" in done.output
    assert (first / "summary.json").stat().st_mtime_ns == written
    with (tmp_path / "runs" / "c" / "compare.csv").open() as file:
        base, full, lora, dora, prompt = csv.DictReader(file)
    assert base["method"] == "no training"
    assert float(base["eval_loss"]) == summary["metrics"]["eval_loss_before"]
    assert float(full["eval_loss"]) == summary["metrics"]["eval_loss"]
    for record, parameters in ((full, 123_200), (lora, 8_192), (prompt, 4 * 64)):
        assert (record["status"], int(record["trainable_parameters"])) == ("finished", parameters)
        assert float(record["eval_loss"]) < float(base["eval_loss"])
        assert int(record["peak_memory_bytes"]) > 2**28
        assert float(record["useful_tokens_per_second"]) > 0
    adapter = tmp_path / "runs" / "c" / "prompt-virtual_tokens4" / "adapter" / "adapter_model.safetensors"
    assert int(prompt["adapter_bytes"]) == adapter.stat().st_size
    assert (dora["status"], "in 8 bits the scales" in dora["error"]) == ("refused", True)
    assert (tmp_path / "runs" / "c" / "compare.png").read_bytes().startswith(b"\x89PNG")
