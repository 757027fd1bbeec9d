"""Copy the program beside a run: a job that is requeued next week runs the code that it was submitted with."""

from __future__ import annotations

import shutil
from pathlib import Path

import launch
import trainer.config
from trainer.files import partial_folder

FOLDER = "code"
# What trainer reads beside itself in a checkout; a wheel has all of it inside.
BESIDE = ("conf", "slurm", "examples/headlines", "examples/medical")


def snapshot(folder: Path) -> Path:
    """Copy the program into a run folder; return the folder to put first on PYTHONPATH.

    An older copy there is replaced: what is submitted now is what runs.

    Raises:
        OSError: it cannot be written.
    """
    code = folder / FOLDER
    package = Path(trainer.config.__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    with partial_folder(code) as partial:
        for each in (package, Path(launch.__file__).parent):
            shutil.copytree(each, partial / each.name, ignore=ignored)
        for name in BESIDE:
            if (beside := package.parent / name).is_dir() and not (package / name).is_dir():
                shutil.copytree(beside, partial / name, ignore=ignored)
        shutil.rmtree(code, ignore_errors=True)
        partial.rename(code)
    return code
