"""One trial of a group: what a run by itself has (folder, checkpoints, metrics, schedule, monitor), and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from trainer.distributed.process_group import from_main
from trainer.errors import AfinaError
from trainer.evaluation.evaluate import EvalResult
from trainer.tracking.files import write_summary
from trainer.tracking.log_only import into_log
from trainer.training.build import Built
from trainer.training.job import Job, describe_failure
from trainer.training.loop import Loop
from trainer.training.outcome import Outcome, Progress
from trainer.training.run import finish_run


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLoop(Loop):
    """The loop of a trial, whose updates and evaluations are made with those of the others.

    Attributes:
        scored: the evaluation that was made for it, until it is taken.
    """

    scored: list[EvalResult] = field(default_factory=list)

    def evaluate(self) -> EvalResult:
        """Return the evaluation that was made with those of the other trials."""
        (result,) = self.scored
        self.scored.clear()
        self.show_samples(result)
        return result


@dataclass(slots=True, kw_only=True, eq=False)
class Trial:
    """A trial that is trained.

    Attributes:
        adapter: its adapter's name in the model.
        job: its run.
        built: what it trains, as a run by itself sees it.
        loop: its schedule, records and checkpoints.
        progress: how far it is.
        record: of the step that it is resumed after, whose evaluation is still to come.
        together: what its summary says of the group.
        error: why it has failed.
    """

    adapter: str
    job: Job
    built: Built
    loop: TrialLoop
    progress: Progress
    record: dict[str, Any] | None
    together: dict[str, Any]
    error: Exception | None = None

    @property
    def label(self) -> str:
        """Return its run folder's name."""
        return self.job.run.folder.name

    @property
    def steps(self) -> int:
        """Return the updates that it has taken."""
        return self.progress.outcome.steps

    @contextmanager
    def own_lines(self) -> Iterator[None]:
        """Write what is logged inside the ``with`` block into its own log."""
        with into_log(self.job.run.folder, self.label):
            yield

    def finish(self, outcome: Outcome, stopped_by: str | None = None) -> None:
        """End it: save what it trained, write its summary, close its trackers. A collective."""
        total_steps = self.loop.schedule.total_steps
        with self.own_lines():
            summary: dict[str, Any] = {}
            try:
                more = {"together": self.together}
                summary = finish_run(self.job, self.built, outcome, total_steps, stopped_by=stopped_by, more=more)
            except AfinaError as error:
                summary = self._failed(error)
            finally:
                self.loop.tracker.close(summary)
        self.error = from_main(self.error)  # what rank 0 alone can meet, in writing

    def result(self) -> str:
        """Return in one line how it has ended."""
        if self.error is not None:
            return f"failed: {self.error}"
        outcome = self.progress.outcome
        scores = "".join(f" {name} {value:.4f}" for name, value in outcome.scores.items())
        return f"ended after step {outcome.steps} of {self.loop.schedule.total_steps}:{scores or ' not scored'}"

    def fail(self, error: Exception) -> None:
        """End it as failed; the others go on."""
        with self.own_lines():
            self.loop.tracker.close(self._failed(error))

    def describe_failure(self, error: Exception) -> dict[str, Any]:
        """Build the summary of a trial that failed, or whose group did."""
        return describe_failure(self.job, error) | {"together": self.together}

    def _failed(self, error: Exception) -> dict[str, Any]:
        self.error = error
        summary = self.describe_failure(error)
        write_summary(self.job.run.folder, summary)
        return summary
