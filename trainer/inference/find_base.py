"""Find the base of a run that may have been moved to another machine, and tell where it is another one."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

from trainer.config import TrainConfig, read_values
from trainer.errors import ModelError
from trainer.methods.base_record import BaseRecord, read_base
from trainer.models.embedded import EMBEDDED, fetch, resolve
from trainer.models.identity import fingerprint

logger = logging.getLogger(__name__)


def find_base(run: Path, config: TrainConfig) -> str:
    """Return the folder or hub id of a run's base: the one that was typed, the run's own, or where that is by now.

    An embedded model that this machine does not have is fetched; a folder that is not where the run's config says is
    looked for where the run has found it.

    Raises:
        ModelError: it is not here; the hint says how to name it.
    """
    name, record = config.model.name_or_path, read_base(run / "adapter")
    is_typed = name != read_values(run / "config.yaml").get("model.name_or_path")
    if is_typed or Path(name).expanduser().is_dir() or name in EMBEDDED:
        return resolve(name, config.model.revision)
    if record is not None and record.kind == "embedded" and record.name in EMBEDDED:
        return str(fetch(record.name))
    is_path = name.startswith(("/", "./", "../", "~"))
    if record is not None and record.kind == "folder":
        if record.path and Path(record.path).is_dir():
            return record.path
        is_path = True
    if is_path:
        reason = f"is the folder of the base of {run}, and is not on this machine"
        hint = f"say where it is now: model.name_or_path=FOLDER behind {shlex.quote(str(run))}"
        raise ModelError("model.name_or_path", value=name, reason=reason, hint=hint)
    return resolve(name, config.model.revision)


def warn_of_other_base(base_dir: str, adapters: Mapping[str, Path | None]) -> None:
    """Warn where adapters were trained on other weights than those of the base that they are put on.

    Args:
        base_dir: of that base; one that is no folder is not looked at.
        adapters: folders by name; ``None`` is the base alone.
    """
    records = {name: record for name, folder in adapters.items() if folder and (record := read_base(folder))}
    known = {name: record for name, record in records.items() if record.fingerprint}
    if not known or not Path(base_dir).is_dir():
        return
    here = fingerprint(Path(base_dir))
    for name, record in known.items():
        if here is not None and record.fingerprint != here:
            logger.warning(_another(name, record, base_dir))


def _another(name: str, record: BaseRecord, base_dir: str) -> str:
    where = f" ({record.path})" if record.path and record.path != record.name else ""
    return (
        f"{name} was trained on {record.name}{where}, and the base here, {base_dir}, has other weights or another dtype"
    )
