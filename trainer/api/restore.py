"""Give a process back as it was before a run was trained in it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from trainer.tracking.logs import LOGGERS, use_handler

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
LIBRARIES = (
    *("DeepSpeed", "bitsandbytes", "torch.distributed.elastic", "transformers"),
    *("tensorboard", "mlflow", "alembic"),
)


@contextmanager
def restored() -> Iterator[None]:
    """Let anything be changed inside the ``with`` block that training changes of its process, and change it back:
    signal handlers, environment, umask, loggers, filters of warnings, the hook of exceptions, torch's switches.
    """
    with ExitStack() as undo:
        undo.enter_context(_environment())
        undo.enter_context(warnings.catch_warnings())
        undo.enter_context(_loggers())
        undo.callback(setattr, sys, "excepthook", sys.excepthook)  # torch puts the rank before each line
        undo.callback(os.umask, os.umask(0o022))
        os.umask(os.umask(0o022) | 0o002)  # nobody but the user and their group may write what is made
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                undo.callback(_set_handler, number, signal.getsignal(number))
        undo.enter_context(_torch_switches())
        yield


def _set_handler(number: int, handler: Any) -> None:
    if handler is not None:  # one that was not set from Python cannot be, either
        signal.signal(number, handler)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _loggers() -> Iterator[None]:
    handler = use_handler(None)
    use_handler(handler)
    ours = [(logger, logger.level, logger.propagate) for logger in map(logging.getLogger, LOGGERS)]
    libraries = [(logger, logger.level) for logger in map(logging.getLogger, LIBRARIES)]
    try:
        yield
    finally:
        use_handler(handler)
        for logger, level, propagate in ours:
            logger.setLevel(level)
            logger.propagate = propagate
        for logger, level in libraries:
            logger.setLevel(level)


@contextmanager
def _torch_switches() -> Iterator[None]:
    import torch
    from transformers.utils import logging as transformers_logging

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    has_cudnn_sdp = torch.backends.cuda.cudnn_sdp_enabled()
    has_bars = transformers_logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_sdp)
        if has_bars:
            transformers_logging.enable_progress_bar()
