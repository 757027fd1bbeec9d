"""One measured run of afina, in a process of its own, by the same entry as ``torchrun -m trainer.train``.

python benchmarks/_afina.py RESULT.json [overrides]

The window opens when the base model is loaded and closes when the adapter is saved: attaching it, the start-up
verification of the packing, DeepSpeed's own start, every step, the saving.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import trainer.train
import trainer.training.build
from trainer.config import load, run_folder


def main(result_file: Path, overrides: list[str]) -> None:
    """Train once and write seconds, tokens, losses and the peak of the resident memory."""
    begin: list[float] = []
    load_model = trainer.training.build.load_model

    def load_and_begin(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        begin.append(time.perf_counter())
        return model

    trainer.training.build.load_model = load_and_begin
    code = trainer.train.main(overrides)
    seconds = time.perf_counter() - begin[0]
    assert code == 0, f"afina ended with {code}"
    lines = (Path(run_folder(load(overrides))) / "metrics.jsonl").read_text().splitlines()
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
