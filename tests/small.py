"""Small tokenizers of other kinds than the tiny model's, and tables made from rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.fetch.tiny import CHATML, TINY_TEXT

LLAMA_LIKE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system ~ '\\n\\n' if loop.first and system else '') }}"
    "{{ m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    """A copy of a tokenizer with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def sentencepiece_like(prepend: str, template: str = CHATML) -> Any:
    """Spaces as ▁, one put before the text (``first``), before each stretch of it (``always``) or none; falls back to
    bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    tree = json.loads(tokenizer.to_str())
    vocabulary = tree["model"]["vocab"]
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    tree["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def adds_bos(tokenizer: Any, token: str) -> Any:
    """A copy that puts a token before every text, as Llama's tokenizer does."""
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    changed.bos_token = token
    token_id = changed.convert_tokens_to_ids(token)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, token_id)]
    )
    return changed


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
