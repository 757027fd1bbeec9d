"""Read which tokens the model's own files say that generation ends at."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

FILES = ("generation_config.json", "config.json")
ADAPTER_FILE = "adapter_config.json"


def model_end_tokens(tokenizer: Any) -> set[str]:
    """Return the end tokens of the model that a tokenizer was loaded with, or that its adapter is for: what servers
    stop at. Empty where none are known."""
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    with suppress(OSError, ValueError, KeyError):
        base = str(json.loads(Path(source, ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"])
        # What was saved beside the adapter holds the base's ends too, wherever the base is by now; no hub is asked.
        return _read(tokenizer, source, local_files_only=True) or _read(tokenizer, base, local_files_only=True)
    return _read(tokenizer, source) if source else set()


def _read(tokenizer: Any, source: str, local_files_only: bool = False) -> set[str]:
    """Return the end tokens that the files of a folder or hub id name."""
    from transformers.utils import cached_file  # a worker comes up before it needs transformers

    for name in FILES:
        with suppress(OSError, ValueError):
            file = cached_file(source, name, local_files_only=local_files_only)
            ids = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id") if file else None
            if ids is not None:
                tokens = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])
                return {token for token in tokens if isinstance(token, str)}
    return set()
