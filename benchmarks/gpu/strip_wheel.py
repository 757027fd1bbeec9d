"""Copy a wheel without most of its shared libraries. Licence, metadata and code stay.

python benchmarks/gpu/strip_wheel.py WHEEL FOLDER LIBRARY…

bitsandbytes' wheel holds a library for each version of CUDA, ROCm and XPU, 41 MiB in all; a machine needs one of them.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the smaller wheel under the same name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the smaller wheel goes")
    parser.add_argument("libraries", nargs="+", metavar="LIBRARY", help="the *.so files that stay")
    asked = parser.parse_args(arguments)
    strip(asked.wheel, asked.folder / asked.wheel.name, asked.libraries)


def strip(source: Path, target: Path, kept: list[str]) -> None:
    """Copy all but the other libraries, and write a RECORD that says so."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as new:
        names = old.namelist()
        if missing := set(kept) - set(names):
            raise SystemExit(f"{source.name} holds no {', '.join(sorted(missing))}")
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        rows: list[tuple[str, str, int | str]] = []
        for name in names:
            if name == record or (name.endswith(".so") and name not in kept):
                continue
            data = old.read(name)
            new.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((name, f"sha256={digest}", len(data)))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        new.writestr(record, text.getvalue())


if __name__ == "__main__":
    main()
