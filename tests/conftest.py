"""What every test shares: an environment that reaches no hub, one cache a session, the models, and who gets skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before anything imports transformers or wandb: both read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")

USER_CACHE = os.environ.get("AFINA_CACHE")
SLURM_COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """AFINA_CACHE for this session and every process it starts: nothing cached earlier can make a test pass."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFINA_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session")
def tiny_model(session_cache: Path) -> Path:
    """Folder of the tiny random model: made in seconds, enough where a test asks for equality."""
    from trainer.models.embedded import fetch

    return Path(fetch("tiny"))


@pytest.fixture(scope="session")
def smollm2(session_cache: Path) -> Path:
    """Folder of SmolLM2-135M-Instruct, from the user's own cache, fetched when it is not there (92 MB and 20 s).

    Pass this path to child processes: by name they would fetch it anew into the session's cache.
    """
    from trainer.models.embedded import fetch

    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE is None:
            patch.delenv("AFINA_CACHE")
        else:
            patch.setenv("AFINA_CACHE", USER_CACHE)
        return Path(fetch("smollm2_135m"))


class ByFile(LoadScopeScheduling):
    """Give each process of `--dist loadfile` a file, but one of them all that starts several ranks, from end to end."""

    def _split_scope(self, nodeid: str) -> str:
        _, kind, *_ = nodeid.split("/")
        return kind if kind in ("distributed", "slurm") else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _cuda():
        _skip(on_gpu, "needs a CUDA device and a torch built for CUDA; run `make test` on such a machine")
    missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
    if missing:
        hint = "apt-get install slurmctld slurmd slurm-client munge (`make test` does it as root)"
        _skip([item for item in items if item.get_closest_marker("slurm")], f"needs {', '.join(missing)}: {hint}")


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))
