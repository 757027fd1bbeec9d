"""The counts of chaos.py that are not about killed ranks: damaged files, two starters at once, a full disk."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._chaos_start import Chaos, Starter

QUOTA = 6_000_000  # bytes of the small disk: room for some checkpoints of the tiny model, not for all


def damaged_files_found(run: Path, count: int, draw: random.Random) -> int:
    """Damage the newest checkpoint of a run: a byte, a shortened or a missing file. Return how often the one before it
    was taken, and the damaged one set aside."""
    from trainer.checkpoint.commit import complete
    from trainer.checkpoint.resume import find_resume_point

    found = 0
    *_, older, newest = complete(run / "checkpoints")
    kept = run.with_name(run.name + ".kept")
    shutil.copytree(newest, kept)
    for _ in range(count):
        file = draw.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
        damage(file, draw)
        taken = find_resume_point(run, "auto")
        aside = [p for p in newest.parent.iterdir() if p.name.startswith("corrupt-")]
        # Without its marker it was never complete.
        found += taken == older and (len(aside) == 1 or not (newest / "COMPLETE").exists())
        for folder in [*aside, newest]:
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, newest)
    return found


def damage(file: Path, draw: random.Random) -> None:
    """Flip a bit of a file in eight of ten cases; else shorten it, or take it away."""
    how, content = draw.random(), bytearray(file.read_bytes())
    if how < 0.8 and content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(content))
    elif how < 0.9:
        file.write_bytes(bytes(content[: draw.randrange(max(1, len(content)))]))
    else:
        file.unlink()


def one_of_two_trains(starter: Starter, keys: list[str], count: int) -> int:
    """Start the same run twice at once; return how often one trained to its end and the other left with code 4 and one
    line."""
    good = 0
    for number in range(count):
        log = starter.folder / f"twice-{number}.txt"
        with log.open("wb") as out, ThreadPoolExecutor(2) as pool:
            both = [pool.submit(starter.run_one, [*keys, f"run.name=two-{number}"], out.fileno()) for _ in range(2)]
            codes = [one.result() for one in both]
        lines = [line for line in log.read_text(errors="replace").splitlines() if "is being trained by" in line]
        good += sorted(codes) == [0, 4] and len(lines) == 1
    return good


def full_disk_is_survived(
    starter: Starter, start: Callable[[str, Chaos], int], digest: Callable[[Path], str], case: str
) -> bool | None:
    """Train on a disk that becomes full, then with room again; return whether the end is the undisturbed one's bits.
    ``None``: this user may not mount one."""
    disk = starter.folder / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={QUOTA}", "tmpfs", str(disk)], check=False).returncode:
        return None
    try:
        filler = disk / "filler"
        thread = threading.Thread(target=fill, args=(disk, filler), daemon=True)
        thread.start()
        first = start("small", Chaos("none may fail"))
        thread.join(10)
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        second = start("small", Chaos())
        same = digest(disk / case) == digest(starter.folder / "straight" / case)
        print(f"full disk: first code {first}, then {second}, same bits: {same}", flush=True)
        return second == 0 and same
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def fill(disk: Path, filler: Path) -> None:
    """Fill the disk once the run has a checkpoint."""
    limit = time.monotonic() + 60
    while not list(disk.glob("*/checkpoints/step-*/COMPLETE")) and time.monotonic() < limit:
        time.sleep(0.02)
    with contextlib.suppress(OSError), filler.open("wb") as out:
        while True:
            out.write(bytes(4096))
            out.flush()
