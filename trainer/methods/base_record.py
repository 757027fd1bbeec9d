"""Record which base an adapter was trained on: what finds it again on another machine, and what tells another one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.files import parse_json, write_atomically
from trainer.redaction import redact_all

BASE_FILE = "base.json"
"""Beside `adapter_config.json`."""
MAX_BYTES = 100_000
MAX_NAME = 200  # characters of a name in a message: it may be anybody's
KINDS = ("embedded", "hub", "folder")


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Name the base of an adapter.

    Attributes:
        name: as `model.name_or_path` takes it: of an embedded model, an id of the hub, or a folder.
        kind: which of these: one of ``KINDS``.
        hub_id: of the hub, where stock PEFT finds it, or what it was made of; ``None`` of a folder.
        revision: the commit of a hub model.
        path: the absolute folder that it was loaded from, on the machine that trained.
        fingerprint: of its configuration and weights, in hex; ``None`` where the files were not to be read.
    """

    name: str
    kind: str
    hub_id: str | None = None
    revision: str | None = None
    path: str | None = None
    fingerprint: str | None = None

    @property
    def stock_name(self) -> str:
        """Return what stock PEFT is told of the base: where it is on the hub, else on this machine."""
        return self.hub_id or self.path or self.name


def write_base(folder: Path, record: BaseRecord) -> None:
    """Write the record into an adapter's folder."""
    text = json.dumps(redact_all(dataclasses.asdict(record)), indent=2, ensure_ascii=False)
    write_atomically(folder / BASE_FILE, f"{text}\n".encode())


def read_base(folder: Path) -> BaseRecord | None:
    """Read the record of an adapter's folder; ``None`` where there is none, or it is none of ours."""
    file = folder / BASE_FILE
    try:
        if file.stat().st_size > MAX_BYTES:
            return None
        found = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    values = {field.name: found.get(field.name) for field in dataclasses.fields(BaseRecord)}
    if not all(value is None or isinstance(value, str) for value in values.values()):
        return None
    if not values["name"] or values["kind"] not in KINDS:
        return None
    return BaseRecord(**values)  # type: ignore[arg-type]  # both that must be texts are


def base_name(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Return what the base of a saved adapter is called, in one line.

    Args:
        folder: of the adapter.
        metadata: its adapter_config.json, for one that afina has not written.
    """
    record = read_base(folder)
    name = record.name if record is not None else metadata.get("base_model_name_or_path")
    return " ".join(str(name).split())[:MAX_NAME] if name else "a base that it does not name"
