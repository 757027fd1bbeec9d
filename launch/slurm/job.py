"""Begin and end a job inside its batch script, slurm/train.sbatch: ``python -m launch.slurm.job begin`` and ``end``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import trainer.config
from launch.process import PREEMPTED
from launch.slurm import queue
from launch.slurm.decide import Life, decide
from trainer.distributed.rendezvous import refuse_tasks_a_node
from trainer.errors import AfinaError, LaunchError
from trainer.files import find_owner, read_json_lines
from trainer.tracking.files import STOP_FILE, SUMMARY_FILE, find_summary

LIVES_FILE = "slurm.jsonl"
"""In a run folder, a line for each start of a job that has ended by itself."""
TAKEN_BACK_SECONDS = 120
WISHED = (STOP_FILE, "run.stop_at_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the two; returns the exit code of the batch script."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["begin"]:
            print(begin(words[1:]))
            return 0
        parser = argparse.ArgumentParser(prog="python -m launch.slurm.job end")
        parser.add_argument("end")
        parser.add_argument("--folder", type=Path)
        for name in ("--job", "--asked"):
            parser.add_argument(name)
        for name in ("--code", "--first-step", "--max-requeues"):
            parser.add_argument(name, type=int)
        return end(**{key: value for key, value in vars(parser.parse_args(words)).items() if key != "end"})
    except AfinaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def begin(overrides: Sequence[str]) -> str:
    """Check the config and the allocation; return the step that is saved, three settings and the run folder, in words.

    Args:
        overrides: of `trainer.train`, ``--config FILE`` before them or not.

    Raises:
        AfinaError: the job cannot be begun as it is.
    """
    refuse_tasks_a_node(os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    words = list(overrides)
    config_file = Path(words[1]) if words[:1] == ["--config"] and len(words) > 1 else None
    config = trainer.config.load(words[2:] if config_file else words, config_file)
    folder = trainer.config.run_folder(config)
    refuse_owned(folder)
    launch = config.launch
    return f"{saved_step(folder)} {launch.max_requeues} {launch.rendezvous_seconds} {folder}"


def end(folder: Path, job: str, code: int, asked: str, first_step: int, max_requeues: int) -> int:
    """Requeue the job, or say why not.

    Args:
        folder: the run folder.
        job: its number, as ``scontrol`` takes it.
        code: exit code of srun.
        asked: the signal that the script has heard, or ``none``.
        first_step: that was saved when this life began.
        max_requeues: ``launch.max_requeues``.

    Returns:
        The exit code of the job. After a requeue Slurm ends it before there is one.
    """
    began = _began()
    summary = find_summary(folder) if _written_since(folder / SUMMARY_FILE, began) else {}
    life = Life(
        code=code,
        status="finished" if code == 0 else summary.get("status"),
        error=summary.get("error"),
        stopped_by=summary.get("stopped_by"),
        first_step=first_step,
        saved_step=saved_step(folder),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    )
    state = queue.find_job(job)
    again, why = decide(life, read_lives(folder, job), state, max_requeues, WISHED)
    _write_life(folder, job, life, asked, began, why)
    if not again:
        print(f"job {job}: {'' if life.status == 'finished' else 'not requeued: '}{why}", flush=True)
        return 0 if life.status == "finished" else PREEMPTED if life.status == "preempted" else code or 1
    print(f"job {job}: requeued at step {life.saved_step}: {why}", flush=True)
    try:
        queue.requeue(job)
    except LaunchError as error:
        print(f"job {job}: {error}; the same command goes on", flush=True)
        return PREEMPTED
    time.sleep(TAKEN_BACK_SECONDS)  # Slurm ends this script when it takes the job
    return PREEMPTED


def saved_step(folder: Path) -> int:
    """Return the step of a run's newest complete checkpoint, 0 without one."""
    complete = (file.parent.name for file in (folder / "checkpoints").glob("step-*/COMPLETE"))
    return max((int(name.removeprefix("step-")) for name in complete if name[5:].isdigit()), default=0)


def read_lives(folder: Path, job: str | None = None) -> list[Life]:
    """Read the lives of a run under Slurm, the oldest first; of one job, where it is named."""
    names = {field.name for field in dataclasses.fields(Life)}
    records = [record for record in read_json_lines(folder / LIVES_FILE) if job in (None, record.get("job"))]
    return [Life(**{name: record[name] for name in names}) for record in records if names <= set(record)]


def refuse_owned(folder: Path) -> None:
    """Refuse to start what somebody trains.

    Raises:
        LaunchError: names the owner.
    """
    if (owner := find_owner(folder)) is not None:
        raise LaunchError(f"run {folder}", reason=f"is trained by {owner}", hint="wait for it, or another run.name")


def _write_life(folder: Path, job: str, life: Life, asked: str, began: float, why: str) -> None:
    if not folder.is_dir():  # it never came so far
        return
    times = {"began": began, "ended": time.time()}
    record = {"job": job, "asked": asked, **times, **dataclasses.asdict(life), "outcome": why}
    with (folder / LIVES_FILE).open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def _began() -> float:
    """Return when this life of the job began: its script, this process's parent or what it was before, is as old."""
    import psutil

    return psutil.Process().create_time()


def _written_since(file: Path, began: float) -> bool:
    try:
        return file.stat().st_mtime >= began
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
