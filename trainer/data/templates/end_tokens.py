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
    from transformers.utils import cached_file  # a worker comes up before it needs transformers

    source = str(getattr(tokenizer, "name_or_path", "") or "")
    with suppress(OSError, ValueError, KeyError):
        source = str(json.loads(Path(source, ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"])
    for name in FILES if source else ():
        with suppress(OSError, ValueError):
            file = cached_file(source, name)
            ids = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id") if file else None
            if ids is not None:
                tokens = tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])
                return {token for token in tokens if isinstance(token, str)}
    return set()
