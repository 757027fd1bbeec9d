"""Show a run to people: a progress bar on a terminal, plain lines in a pipe or a job's log, and `log.txt` always."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import TRIAL
from trainer.tracking.log_file import LogFile
from trainer.tracking.logs import LineHandler, draws_bars, print_above, print_line, use_handler

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MAX_LINES = 200
MAX_SILENCE_SECONDS = 30.0
MAX_ANSWER = 60  # letters, where it is shown beside the one before

# What a step line shows of the record, in this order; evaluations follow with every key that is not of training.
TRAINING_KEYS = frozenset(
    {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "label_tokens",
        "useful_tokens",
        "computed_tokens",
        "useful_tokens_per_second",
        "step_seconds",
        "data_seconds",
        "peak_memory_bytes",
        "reserved_memory_bytes",
        "model_flops_utilization",
        "useful_flops_utilization",
        "loss_scale",
        "elapsed_seconds",
    }
)


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Return whether a record carries more than the keys of a training step."""
    return bool(record.keys() - TRAINING_KEYS)


def step_line(record: Mapping[str, Any], total_steps: int, eta_seconds: float | None) -> str:
    """Format a record as one line: ``step 12/75 loss 0.412 lr 4.9e-04 320 tok/s 1.9 GiB eta 3:12 eval_loss 0.39``."""
    parts = [f"step {record['step']}/{total_steps}", *_training_parts(record)]
    if eta_seconds is not None and record["step"] < total_steps:
        parts.append(f"eta {clock(eta_seconds)}")
    parts += [f"{key} {_short(value)}" for key, value in record.items() if key not in TRAINING_KEYS]
    return " ".join(parts)


def clock(seconds: float) -> str:
    """Format seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Eta:
    """Estimate the time left from the steps of this process alone: a resumed run must not count what it did not do."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def seconds(self, step: int) -> float | None:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * max(0, self._total_steps - step)


class Terminal:
    """Show one run's lines, bar and tables, and write its `log.txt`; while open, it takes this program's log records.

    A closed terminal or a full disk never raises.
    """

    def __init__(self, folder: Path, *, total_steps: int, resume_step: int) -> None:
        self._total_steps = total_steps
        self._every = max(1, math.ceil(total_steps / MAX_LINES))
        self._eta = Eta(total_steps)
        self._last_line_time = -math.inf
        self._answers: dict[str, str] = {}  # the last one to each prompt
        self._is_trial = TRIAL in os.environ
        self._log = LogFile(folder)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if draws_bars(sys.stdout):
            self._bar, self._task = _start_bar(total_steps, resume_step)
        self._handler = LineHandler(self.write_line, bar=self._bar)
        self._handler_before = use_handler(self._handler)

    def step(self, record: Mapping[str, Any]) -> None:
        """Move the bar, or print a line if one is due (see ``_is_due``)."""
        eta = self._eta.seconds(record["step"])
        line = step_line(record, self._total_steps, eta)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=record["step"])
            # An evaluation alone has no loss and speed; the bar goes on showing the last ones.
            if note := " ".join(_training_parts(record)):
                self._bar.update(self._task, note=note)
        if not self._is_due(record):
            return
        self._last_line_time = time.monotonic()
        self._log.write(line)
        if self._bar is None or is_evaluation(record):
            self._print(line)

    def write_line(self, text: str) -> None:
        """Write a line above the bar and, with the time, into `log.txt`."""
        self._log.write(text)
        self._print(text)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show answers: mappings with ``prompt``, ``reference`` and ``answer``. People see a prompt once, and then how
        its answer changes; `log.txt` holds all of each. A trial of a sweep shows none."""
        if not rows:
            return
        self._log.write("\n".join(sample_text(number, row) for number, row in enumerate(rows, start=1)))
        prompts = [str(row["prompt"]) for row in rows]
        is_known = self._answers.keys() >= set(prompts)
        if not self._is_trial and is_known:
            self._print("\n".join(self._change(number, row) for number, row in enumerate(rows, start=1)))
        elif not self._is_trial and self._bar is None:
            self._print("\n".join(sample_text(number, row) for number, row in enumerate(rows, start=1)))
        elif not self._is_trial:
            self._guard(lambda: self._table(rows))
        self._answers.update({prompt: str(row["answer"]) for prompt, row in zip(prompts, rows, strict=True)})

    def _change(self, number: int, row: Mapping[str, Any]) -> str:
        """Format an answer beside the one before: ``sample 1: no → yes (reference yes)``."""
        before, answer, reference = (
            _shortened(text) for text in (self._answers[str(row["prompt"])], str(row["answer"]), str(row["reference"]))
        )
        return f"sample {number}: {answer if before == answer else f'{before} → {answer}'} (reference {reference})"

    def stop_bar(self) -> None:
        """Take the bar away; lines are printed plainly from here on."""
        if self._bar is not None:
            self._bar.live.transient = True
            self._guard(self._bar.stop)
            self._bar = self._handler.bar = None

    def close(self) -> None:
        """Stop the bar and give the log records back to whoever had them."""
        self.stop_bar()
        latest = use_handler(self._handler_before)
        if latest is not self._handler:  # a later run's, which keeps them
            use_handler(latest)

    def _is_due(self, record: Mapping[str, Any]) -> bool:
        """Return whether a step gets a line: all of few; of many about ``MAX_LINES``, yet never silence, and always
        evaluations and the end."""
        step = record["step"]
        return (
            step % self._every == 0
            or step == self._total_steps
            or is_evaluation(record)
            or time.monotonic() - self._last_line_time >= MAX_SILENCE_SECONDS
        )

    def _print(self, text: str) -> None:
        bar = self._bar
        if bar is None:
            print_line(text)
        else:
            self._guard(lambda: print_above(bar, _printable(text)))

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        from rich.table import Table
        from rich.text import Text

        assert self._bar is not None
        table = Table("prompt", "reference", "answer", show_lines=True)
        for row in rows:
            table.add_row(*(Text(_printable(str(row[name]))) for name in ("prompt", "reference", "answer")))
        self._bar.console.print(table)

    def _guard(self, show: Callable[[], object]) -> None:
        try:
            show()
        except OSError:
            # The reader of the pipe has gone (`| head`) or the terminal was closed. The training was not.
            self._bar = self._handler.bar = None
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def _start_bar(total_steps: int, resume_step: int) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    # The speed is guessed over minutes: steps are slow, and an evaluation between two would upset a short window.
    bar = Progress(*columns, speed_estimate_period=300, refresh_per_second=4)
    bar.start()
    return bar, bar.add_task("train", total=total_steps, completed=resume_step, note="")


def _training_parts(record: Mapping[str, Any]) -> list[str]:
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "useful_tokens_per_second": "{:.0f} tok/s",
    }
    parts = [form.format(record[key]) for key, form in formats.items() if record.get(key) is not None]
    if record.get("peak_memory_bytes"):
        parts.append(f"{record['peak_memory_bytes'] / 2**30:.1f} GiB")
    return parts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sample_text(number: int, row: Mapping[str, Any]) -> str:
    """Format an answer with its prompt and reference, a line each."""
    fields = [(name, _indented(_printable(str(row[name])))) for name in ("prompt", "reference", "answer")]
    return "\n".join([f"sample {number}", *(f"  {name:<9}  {text}" for name, text in fields)])


def _shortened(text: str) -> str:
    """Return a text as one line of at most ``MAX_ANSWER`` letters."""
    line = " ".join(_printable(text).split())
    return line if len(line) <= MAX_ANSWER else line[: MAX_ANSWER - 1] + "…"


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 13)


def _printable(text: str) -> str:
    """Replace control characters: a model's answer may hold any, and a terminal would obey them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
