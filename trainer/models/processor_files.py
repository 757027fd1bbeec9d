"""Copy what a multimodal model's processor is read from, which belongs to every copy of the model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from trainer.methods.text_part import is_wrapper
from trainer.models.hub import is_hub_model

logger = logging.getLogger(__name__)
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Where processors of older transformers have their template; the tokenizer's own takes its place.
TEMPLATE_FILES = ("chat_template.json", "chat_template.jinja")


def copy_processor_files(model: Any, folder: Path, revision: str | None) -> None:
    """Copy the processor's files of a multimodal base beside a model that was made of it; of others nothing.

    Args:
        model: as it was loaded: where from says ``name_or_path``.
        folder: with the model and its tokenizer; its own files are kept.
        revision: of a hub model.
    """
    if not is_wrapper(model):
        return
    has_template = any((folder / name).exists() for name in TEMPLATE_FILES)
    names = FILES if has_template else (*FILES, *TEMPLATE_FILES)
    found = {name: source for name in names if (source := _find(model.name_or_path, name, revision)) is not None}
    for name, source in found.items():
        if not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    if not found.keys() & set(FILES):
        logger.warning(f"no processor's files are found beside {model.name_or_path}: for images {folder} needs them")


def _find(base: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model folder or hub id; ``None`` where it has none, or the hub cannot be reached."""
    if not is_hub_model(base):
        file = Path(base) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(base, name, revision=revision))
    except EntryNotFoundError:
        return None
