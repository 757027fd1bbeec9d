"""Let something else stand in for the training of trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import launch.sweep.sweep
import launch.trials


def stand_in(monkeypatch: pytest.MonkeyPatch, folder: Path, run_trial: Callable[..., tuple[int, str]]) -> None:
    """Call ``run_trial`` in the place of ``launch.trials.run_trial``, in ``folder``, on a machine without a GPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch.trials, "run_trial", run_trial)
    monkeypatch.setattr(launch.sweep.sweep, "visible_gpus", lambda: 0)
