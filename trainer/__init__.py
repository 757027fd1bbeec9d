"""afina: fine-tunes causal language models under DeepSpeed. From Python: docs/python.md.

The rooms and their order are in CONTRIBUTING.md.
"""

# All are loaded before any file of the working folder could be.
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.api import (
        AfinaError,
        CheckpointError,
        ConfigError,
        DataError,
        LaunchError,
        ModelError,
        Result,
        Run,
        TrainConfig,
        TrainingError,
        load,
        load_run,
        train,
    )

    __version__: str

__all__ = [
    "AfinaError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "ModelError",
    "Result",
    "Run",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "load",
    "load_run",
    "train",
]


def keep_working_folder_out() -> None:
    """Keep Python from importing out of the working folder, here and in every process that is started from here: a
    ``json.py`` or ``torch.py`` beside somebody's data is not meant for us.

    ``python -m`` puts that folder first, before any module of ours can be asked; the checkout is left where it is.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    here, home = os.path.realpath(os.getcwd()), os.path.realpath(os.path.join(os.path.dirname(__file__), ".."))
    if here != home:
        sys.path[:] = [folder for folder in sys.path if folder and os.path.realpath(folder) != here]


def deny_others_writing() -> None:
    """Let nobody but the user and their group write what is made from here on, whatever the umask was."""
    os.umask(os.umask(0o022) | 0o002)


# In 16 bits on CPU torch keeps code for each shape of a product that it has met, 0.6 MiB each and, unless told, 1024 of
# them: half a GiB within thirty updates, whose batches differ in size. An update of eight LoRA trials meets some 60.
for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(cache, "256")
del cache

if any(word == "-m" and name.partition(".")[0] == __name__ for word, name in zip(sys.orig_argv, sys.orig_argv[1:])):
    keep_working_folder_out()

import logging  # noqa: E402

# Said at import, by whichever library imports bitsandbytes first, about a kernel that afina does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if not TYPE_CHECKING:  # where every attribute would seem to be there

    def __getattr__(name):
        """Load what ``__all__`` names when it is asked for: ``import trainer`` takes no time."""
        import importlib.metadata

        if name == "__version__":
            return importlib.metadata.version("afina")
        if name in __all__:
            return getattr(importlib.import_module(f"{__name__}.api"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
