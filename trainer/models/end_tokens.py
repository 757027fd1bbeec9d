"""Save a tokenizer and the tokens that end an answer, so that whoever serves the model stops where its answers did."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.data.templates.time_limit import TimeLimit
from trainer.files import write_atomically

_TIME_LIMIT = TimeLimit(10.0)

logger = logging.getLogger(__name__)

GENERATION_FILE, TOKENIZER_FILE = "generation_config.json", "tokenizer_config.json"
BASE_EOS = "base_eos_token"  # key of TOKENIZER_FILE, which transformers passes over: the base's own end token


def save_tokenizer(tokenizer: Any, folder: Path, end_ids: Sequence[int], generation_config: Any) -> None:
    """Save a tokenizer beside weights, with what ends an answer, where the base ends with another token: as its
    ``eos_token``, and in ``generation_config.json`` as a list, before the base's own ends.

    Args:
        tokenizer: of the base; it is left as it is.
        folder: where the weights are; a ``generation_config.json`` in it is kept but for its ends.
        end_ids: token ids that end an answer, as training has taught them, the last answer's first.
        generation_config: the base's; ``None`` leaves ``generation_config.json`` out.
    """
    if not end_ids or generation_config is None:
        tokenizer.save_pretrained(str(folder))
        return
    own = generation_config.eos_token_id
    own_ids = own if isinstance(own, list) else [] if own is None else [own]
    end_ids = [int(token) for token in end_ids]
    saved = tokenizer
    if tokenizer.eos_token_id not in end_ids:
        saved = _with_eos(tokenizer, tokenizer.convert_ids_to_tokens(end_ids[0]))
    saved.save_pretrained(str(folder))
    if saved is not tokenizer:
        _update(folder / TOKENIZER_FILE, {BASE_EOS: tokenizer.eos_token})
    is_new = not set(end_ids) <= set(own_ids)
    if is_new:
        if not (folder / GENERATION_FILE).is_file():
            write_atomically(folder / GENERATION_FILE, generation_config.to_json_string(use_diff=True).encode())
        everywhere = list(dict.fromkeys([*end_ids, *own_ids]))
        _update(folder / GENERATION_FILE, {"eos_token_id": everywhere}, without=("_from_model_config",))
    if is_new or saved is not tokenizer:
        taught, before = (", ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (end_ids, own_ids))
        files = [GENERATION_FILE] * is_new + ["eos_token"] * (saved is not tokenizer)
        say = f"{' and '.join(files)} say{'s' if len(files) == 1 else ''} so"
        logger.info(f"answers end with {taught}: the saved {say} (the base's own end: {before or 'none'})")


def restore_base_eos(tokenizer: Any, folder: Path) -> Any:
    """Give a tokenizer that was read from a run's folder the end token that it was trained with, so that the run's rows
    are found as they were prepared. Returns the same tokenizer."""
    try:
        base_eos = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8")).get(BASE_EOS)
    except (OSError, ValueError, AttributeError):
        return tokenizer
    if isinstance(base_eos, str) and base_eos in tokenizer.get_vocab():
        tokenizer.eos_token = base_eos
    return tokenizer


def _with_eos(tokenizer: Any, end: str) -> Any:
    """Copy a tokenizer with another end token; the same one where its chat template would then write other prompts."""
    copied = copy.deepcopy(tokenizer)
    copied.eos_token = end
    return copied if _prompt(copied) == _prompt(tokenizer) else tokenizer


def _prompt(tokenizer: Any) -> str | None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        with _TIME_LIMIT.limited():
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template is code of its author's, and may be missing
        return None


def _update(file: Path, values: dict[str, Any], without: Sequence[str] = ()) -> None:
    tree = {name: value for name, value in json.loads(file.read_text(encoding="utf-8")).items() if name not in without}
    write_atomically(file, (json.dumps({**tree, **values}, indent=2, ensure_ascii=False) + "\n").encode())
