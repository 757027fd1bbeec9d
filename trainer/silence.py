"""Silence for messages that libraries print on every healthy run, so that ours can be seen."""

from __future__ import annotations

import logging
import warnings


def silence_libraries() -> None:
    """Turn off, each for its reason:

    - DeepSpeed's and bitsandbytes' notes on kernels that this machine does not need (errors still show);
    - transformers' weight-loading bars: ours says what is loaded;
    - deprecations inside torch.distributed and transformers, which are for DeepSpeed's and PEFT's authors to follow.
    """
    for name in ("DeepSpeed", "bitsandbytes", "torch.distributed.elastic"):
        library = logging.getLogger(name)
        library.setLevel(logging.ERROR)
        library.addFilter(_is_error)  # DeepSpeed sets its own level when it is imported, which may be later
    for module in (r"torch\.distributed", r"transformers", r"peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
