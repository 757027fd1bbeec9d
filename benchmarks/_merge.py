"""One measured merge, in a process of its own: `afina merge` without the command line.

python benchmarks/_merge.py RESULT.json RUN TO

Resident memory is read 200 times a second, with how much of it is this process's own (anonymous) and how much are pages
of files it has mapped, which the system takes back when it needs them. Each part of the merge has its own peak.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  `afina merge` loads it too: it belongs to what importing costs

import trainer.merge.merge
from trainer.inference.merge import merge_run

# A function of trainer.merge.merge: the part that it is, and the one that follows.
PARTS = {"fold": ("folding", "digests"), "_write": ("writing", "reading back, its answers")}


class PeakMonitor(threading.Thread):
    """Records the peaks of this process's memory by part, in bytes: own, file and both together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.part, self.peaks = "loading, live answers", {}

    def run(self) -> None:
        while True:
            own, file = resident()
            peak = self.peaks.setdefault(self.part, {"own": 0, "file": 0, "both": 0})
            for name, value in (("own", own), ("file", file), ("both", own + file)):
                peak[name] = max(peak[name], value)
            time.sleep(0.005)

    def during(self, function: Any, part: str, after: str) -> Any:
        """Return the same function, whose memory is recorded under a part of its own."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.part = part
            result = function(*args, **kwargs)
            self.part = after
            return result

        return watched


def resident() -> tuple[int, int]:
    """Return the resident bytes of this process: its own, and of mapped files (shared memory with them)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, file, shared = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem"))
    return own, file + shared


def main(result_file: Path, run: Path, to: Path) -> None:
    """Merge once and write the peaks, and what was resident before."""
    before, monitor = sum(resident()), PeakMonitor()
    for name, (part, after) in PARTS.items():
        setattr(trainer.merge.merge, name, monitor.during(getattr(trainer.merge.merge, name), part, after))
    monitor.start()
    begin = time.perf_counter()
    merged = merge_run(run, to)
    result = {
        "imports_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.perf_counter() - begin,
        "parts": monitor.peaks,
        "distance": merged.distance,
        "base_distance": merged.base_distance,
    }
    result_file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*(Path(name) for name in sys.argv[1:]))
