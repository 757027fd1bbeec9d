"""Record a run for TensorBoard, in event files of the run folder, from rank 0: one curve over all lives of the run."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config.schema import TrainConfig
from trainer.redaction import redact
from trainer.tracking.external import first_line, flat_config, numbers
from trainer.tracking.files import strict

FOLDER = "tensorboard"

logger = logging.getLogger(__name__)


class TensorboardRun:
    """Record a run in TensorBoard's event files. No method raises; the first problem is logged and ends them for this
    process.

    Args:
        config: the resolved configuration: the run's hparams.
        folder: the run folder; the files are in its ``tensorboard/``.
        model_info: what is recorded beside the config.
        records: what earlier lives of the run logged before the step it is resumed after, in the order of steps.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        model_info: Mapping[str, Any],
        records: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._file: EventFile | None = None
        # The evaluation of the step that a run is resumed after is made again: its record is merged with that.
        self._held: dict[str, Any] = {}
        try:
            self._start(config, folder / FOLDER, model_info, records)
        except Exception as error:
            self._file = None
            logger.warning(f"TensorBoard is off for this run: {first_line(error)}")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one record under its own step."""
        held, self._held = self._held, {}
        if held and held["step"] == record["step"]:
            record = {**held, **record}
        elif held:
            self._write(lambda file: file.add_record(held))
        self._write(lambda file: file.add_record(record))

    def alert(self, title: str, text: str) -> None:
        """Add an alert to the page of texts."""
        self._write(lambda file: file.add_text("alert", redact(f"**{title}**: {text}"), 0))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the summary to the page of texts, and close the file."""
        if self._held:
            self.log(self._held)
        text = redact(f"```\n{json.dumps(strict(summary), indent=1)}\n```")
        self._write(lambda file: file.add_text("summary", text, int(summary.get("steps") or 0)))
        self._write(lambda file: file.close())
        self._file = None

    def _write(self, write: Callable[[EventFile], object]) -> None:
        if self._file is None:
            return
        try:
            write(self._file)
        except Exception as error:
            self._file = None
            logger.warning(f"TensorBoard stopped recording, training goes on: {first_line(error)}")

    def _start(
        self, config: TrainConfig, folder: Path, model_info: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
    ) -> None:
        has_earlier_files = any(folder.glob("events.out.tfevents.*"))
        known = read_steps(folder) if has_earlier_files else set()
        self._held = dict(records[-1]) if records else {}
        first = min([self._held.get("step", 0), *(record["step"] for record in records if record["step"] not in known)])
        self._file = EventFile(folder, first if has_earlier_files else None)
        self._file.add_hparams(flat_config(config, model_info))
        for record in records[:-1]:
            if record["step"] >= first:
                self._file.add_record(record)


class EventFile:
    """Write one event file. Each addition is on its way to the disk when the call returns: a kill loses nothing of it.

    Not ``SummaryWriter``, whose thread prints a traceback when a disk is full, and again at the end of the process.

    Args:
        folder: where it is made.
        first: what earlier files of the folder have of this step and later ones is not shown any more; ``None``: they
            are shown as they are.
    """

    def __init__(self, folder: Path, first: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # read in the order of names
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._event = Event
        self._records = RecordWriter((folder / name).open("xb"))
        self._add(file_version="brain.Event:2")
        if first is not None:
            self._add(step=first, session_log=SessionLog(status=SessionLog.START))

    def add_record(self, record: Mapping[str, Any]) -> None:
        """Add the numbers of a record, in single precision, under its step."""
        from torch.utils.tensorboard.summary import scalar

        for key, value in numbers(record).items():
            self._add(step=record["step"], summary=scalar(key, value))
        self._records.flush()

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        self._add(step=step, summary=text_summary(tag, text))
        self._records.flush()

    def add_hparams(self, values: Mapping[str, Any]) -> None:
        """Add what the run is compared with others by."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, (bool, int, float)) else str(value) for key, value in values.items()}
        for summary in hparams(plain, {"eval_loss": None})[:2]:
            self._add(summary=summary)
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())


def read_steps(folder: Path) -> set[int]:
    """Read which steps TensorBoard shows of the event files in a folder, also where a kill tore their end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resume that it finds
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {event.step for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
