"""``import trainer``: cheap, and the config that the command line has. Training: tests/end_to_end/test_api.py."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import trainer
import trainer.config
from tests.helpers.processes import ROOT
from trainer.api.restore import restored
from trainer.cli.app import main

HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "wandb", "mlflow", "tensorboard")


def loaded_after(code: str) -> list[str]:
    code += f"\nimport sys\nprint(*[name for name in {(*HEAVY, 'hydra')} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_import_loads_nothing_and_load_no_torch() -> None:
    assert loaded_after("import trainer; trainer.__version__; dir(trainer)") == []
    code = "import trainer; trainer.load(['debug=tiny']); trainer.train, trainer.load_run, trainer.Result, trainer.Run"
    assert loaded_after(code) == ["hydra"]


def test_it_gives_what_it_names() -> None:
    assert trainer.__version__ == importlib.metadata.version("afina")
    assert set(trainer.__all__) <= set(dir(trainer))
    assert all(getattr(trainer, name) is not None for name in trainer.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        trainer.trian  # noqa: B018


@pytest.mark.slow
def test_train_can_be_called_after_its_module_was_imported() -> None:
    """``python -m trainer.train`` has the name of the function."""
    code = (
        "import trainer, trainer.train\n"
        "assert trainer.train.main\n"
        "config = trainer.load(['debug=tiny']); config.method.r = 0\n"
        "try:\n    trainer.train(config)\nexcept trainer.ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("method.r=0: must be at least 1"), done.stderr


def test_load_is_what_config_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["debug=tiny", "method=dora", "method.r=24"]
    config = trainer.load(overrides)
    assert config == trainer.config.load(overrides)
    assert main(["config", *overrides]) == 0
    printed = capsys.readouterr().out
    assert trainer.config.to_yaml(config).strip() in printed
    (tmp_path / "config.yaml").write_text(trainer.config.to_yaml(config))
    again = trainer.load(["method.r=8"], tmp_path / "config.yaml")
    assert again == dataclasses.replace(config, method=dataclasses.replace(config.method, r=8))


def test_one_override_may_be_a_text() -> None:
    assert trainer.load("method.r=24").method.r == 24


def test_an_unknown_key_is_the_error_of_the_command_line() -> None:
    with pytest.raises(trainer.ConfigError) as caught:
        trainer.load(["method.rr=8"])
    assert (caught.value.what, caught.value.value) == ("method.rr", "8")
    assert "did you mean method.r=8" in caught.value.hint


def test_a_config_that_was_changed_by_hand_is_checked() -> None:
    config = trainer.load(["debug=tiny"])
    config.batch.global_size = 0
    with pytest.raises(trainer.ConfigError, match=r"batch\.global_size=0: must be at least 1"):
        trainer.train(config)


def test_one_of_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(trainer.LaunchError, match="2 ranks: trains in one process → torchrun"):
        trainer.train(trainer.load(["debug=tiny"]))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(trainer.CheckpointError, match=r"is not a run folder \(no config.yaml there\)"):
        trainer.load_run(tmp_path)


def test_a_run_that_has_not_begun_has_no_summary_and_no_metrics(tmp_path: Path) -> None:
    config = trainer.load(["debug=tiny", "method.r=24"])
    (tmp_path / "config.yaml").write_text(trainer.config.to_yaml(config))
    run = trainer.load_run(tmp_path)
    assert (run.summary, run.metrics, run.config.method.r) == (None, [], 24)


def test_what_is_changed_inside_is_changed_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("KEPT", "1")
    before = (dict(os.environ), signal.getsignal(signal.SIGTERM), sys.excepthook, list(warnings.filters))
    with contextlib.suppress(KeyboardInterrupt), restored():
        os.environ.update(RANK="0", KEPT="2")
        signal.signal(signal.SIGTERM, lambda *_: None)
        sys.excepthook = print
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True)
        os.umask(0)
        raise KeyboardInterrupt
    assert before == (dict(os.environ), signal.getsignal(signal.SIGTERM), sys.excepthook, list(warnings.filters))
    assert not torch.are_deterministic_algorithms_enabled()
    umask = os.umask(0o022)
    os.umask(umask)
    assert umask != 0
