"""One measured run of afina, in a process of its own, by the same entry as ``torchrun -m trainer.train``.

python benchmarks/_afina.py RESULT.json [overrides]

The window opens when the base model is loaded and closes when the adapter is saved: attaching it, the start-up proof of
the packing, DeepSpeed's own start, every step, the saving.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import trainer.train
from trainer.config import load, run_folder
from trainer.distributed.process_group import from_environment
from trainer.silence import silence_libraries


def main(result_file: Path, overrides: list[str]) -> None:
    """Train once and write seconds, tokens, losses and the peak of the resident memory."""
    silence_libraries()
    begin: list[float] = []
    load_model = trainer.train.load_model

    def then_begin(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        begin.append(time.perf_counter())
        return model

    trainer.train.load_model = then_begin
    config = load(overrides)
    code = trainer.train.train(config, from_environment())
    seconds = time.perf_counter() - begin[0]
    assert code == 0, f"afina ended with {code}"
    lines = (Path(run_folder(config)) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    result_file.write_text(
        json.dumps(
            {
                "seconds": seconds,
                "useful_tokens": sum(r["useful_tokens"] for r in records),
                "computed_tokens": sum(r["computed_tokens"] for r in records),
                "losses": [r["loss"] for r in records],
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
