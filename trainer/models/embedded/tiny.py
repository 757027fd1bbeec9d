"""Build a random model with a real tokenizer, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.models.embedded.common import quiet_transformers

TINY_TEXT = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request. Translate the sentence to Spanish. Summarize the following
text in one short line. What is the capital of France? The user asks a question and the assistant gives an answer."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tiny(folder: Path) -> None:
    """Fill ``folder`` with a seeded random Llama and its tokenizer.

    Two builds are equal byte for byte; the caller's random state is left alone.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        tokenizer = _tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            initializer_range=0.1,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    """Train a byte-level BPE: every text has tokens, and a few merges make them longer than a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TINY_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
