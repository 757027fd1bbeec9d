"""Every method on the demo's rows, each at a learning rate found for it, with `afina compare`.

python benchmarks/methods.py [--rows 1600]

SmolLM2-135M, the sarcastic headlines, 16 rows an update. First learning rates are tried on 320 rows: the method's own
and three times it, then on beyond the edge while the edge is best; the same held-out rows judge the tries and the
table. Then each method trains once on all rows. Resumes where it was interrupted (runs/methods). Writes methods.md,
methods.csv and methods.png beside this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAME = "methods"


def main() -> None:
    """Compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1600)
    rows = parser.parse_args().rows
    overrides = ["experiment=demo", f"compare.rows={rows}", "compare.tune=[1,3]", f"run.name={NAME}", "run.dir=runs"]
    command = [sys.executable, "-m", "trainer.cli", "compare", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "WANDB_MODE": "offline"})
    folder = ROOT / "runs" / NAME
    for kind in ("csv", "png"):
        shutil.copyfile(folder / f"compare.{kind}", HERE / f"{NAME}.{kind}")
    (HERE / f"{NAME}.md").write_text(
        f"SmolLM2-135M in bf16 on {os.cpu_count()} CPU cores; {rows} headlines seen once, 16 an update, scored "
        "on 256 held-out rows; each method at the best of its tries on 320 rows, which stand below.\n\n"
        + (folder / "compare.md").read_text()
    )


if __name__ == "__main__":
    main()
