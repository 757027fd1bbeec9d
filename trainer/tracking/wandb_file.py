"""Read which history steps the `.wandb` files of a run folder hold, also where a kill tore their end.

wandb's service process writes a LevelDB log: after a header of the file blocks of 32 KiB, of chunks, whose data are the
whole or a part of one protobuf record.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from trainer.compat.wandb import parse_record

FILE_HEADER = b":W&B\xe1\xbe\x00"  # the last byte is the format's version
BLOCK_BYTES = 32 * 1024
CHUNK_HEADER_BYTES = 7  # CRC-32 of kind and data (4), bytes of data (2), kind (1)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def find_wandb_files(folder: Path) -> list[Path]:
    """Find the `.wandb` files, online and offline, of all lives of the run in ``folder``."""
    return list((folder / "wandb").glob("*run-*/*.wandb"))


def read_steps(paths: Iterable[Path]) -> set[int]:
    """Read which history steps these files hold between them. A file that cannot be read holds none."""
    steps: set[int] = set()
    for path in paths:
        with suppress(OSError):
            for record in read_records(path):
                if record.HasField("history") and (step := _step(record.history)) is not None:
                    steps.add(step)
    return steps


def read_records(path: Path) -> Iterator[Any]:
    """Yield the protobuf ``Record``s of a `.wandb` file in order; what comes after the first damage is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        parts: list[bytes] | None = None
        for kind, data in _chunks(file):
            if kind in (FULL, FIRST):
                parts = []
            if parts is None:
                return
            parts.append(data)
            if kind in (FULL, LAST):
                yield parse_record(b"".join(parts))
                parts = None


def _chunks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield kind and data of the chunks of an open file, up to its end or the first one that is torn or damaged."""
    block = file.read(BLOCK_BYTES)
    if not block.startswith(FILE_HEADER):
        return
    position = len(FILE_HEADER)
    while block:
        # Fewer bytes than a header at the end of a block are padding.
        while position + CHUNK_HEADER_BYTES <= len(block):
            begin = position + CHUNK_HEADER_BYTES
            checksum, length, kind = block[position : begin - 3], block[begin - 3 : begin - 1], block[begin - 1]
            position = begin + int.from_bytes(length, "little")
            # A machine that goes down may leave zeros where data should be.
            if kind not in (FULL, FIRST, MIDDLE, LAST) or position > len(block):
                return
            if zlib.crc32(block[begin - 1 : position]) != int.from_bytes(checksum, "little"):
                return
            yield kind, block[begin:position]
        block, position = file.read(BLOCK_BYTES), 0


def _step(history: Any) -> int | None:
    """Return the step of a history record, which has it as a field of its own, as an item ``_step``, or not at all."""
    if history.HasField("step"):
        return int(history.step.num)
    for item in history.item:
        if item.key == "_step" or list(item.nested_key) == ["_step"]:
            return int(json.loads(item.value_json))
    return None
