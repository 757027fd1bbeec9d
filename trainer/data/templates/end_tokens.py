"""Read which tokens the model's own files say that generation ends at."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

FILES = ("generation_config.json", "config.json")


def model_end_tokens(tokenizer: Any) -> set[str]:
    """Return the end tokens of the model that a tokenizer was loaded with: what servers stop at.

    Nothing is fetched: they are read from the tokenizer's folder, or from the hub's cache, where the model's files are
    by the time its tokenizer is. Empty where none are known.
    """
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    for name in FILES:
        with suppress(OSError, ValueError):
            found: Any = Path(source, name) if Path(source).is_dir() else try_to_load_from_cache(source, name)
            ids = json.loads(Path(found).read_text(encoding="utf-8")).get("eos_token_id") if found else None
            if ids is not None:
                tokens = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])
                return {token for token in tokens if isinstance(token, str)}
    return set()
