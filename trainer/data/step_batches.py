"""Make the micro-batches of a step, and those of the next step while the device works on this one."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

import numpy as np
import torch

from trainer.data.batching.global_batch import global_batch
from trainer.data.batching.micro_batch import MicroBatch
from trainer.data.batching.packing import Packing
from trainer.data.run_data import Rows


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one step trains on.

    Attributes:
        chosen: the training rows of the global batch, int64, shape (global_size,).
        lengths: tokens of each of them, int64, shape (global_size,).
        label_tokens: of the global batch.
        computed_tokens: what the devices run for it, over all ranks.
        batches: this rank's micro-batches, on the host.
    """

    chosen: np.ndarray
    lengths: np.ndarray
    label_tokens: int
    computed_tokens: int
    batches: list[MicroBatch]

    @property
    def useful_tokens(self) -> int:
        """The rows' own tokens."""
        return int(self.lengths.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSource:
    """Where the batches of a step come from: a pure function of the step.

    Attributes:
        rows: the training rows.
        packing: how they share a forward.
        seed: ``run.seed``.
        global_size: examples a step.
        rank, world_size: of this process.
        device: where the batches will go. For a GPU they are laid in page-locked memory.
    """

    rows: Rows
    packing: Packing
    seed: int
    global_size: int
    rank: int
    world_size: int
    device: torch.device

    def count_tokens(self, step: int) -> tuple[int, int]:
        """Return the tokens of a step's rows, and those that are computed for them, over all ranks."""
        examples = self.rows.tokens(global_batch(self.seed, step, len(self.rows), self.global_size))
        return sum(len(e.ids) for e in examples), self.packing.split(examples, self.world_size).computed_tokens

    def make(self, step: int) -> StepBatches:
        """Make the batches of the update after ``step`` others."""
        chosen = global_batch(self.seed, step, len(self.rows), self.global_size)
        examples = self.rows.tokens(chosen)
        layout = self.packing.split(examples, self.world_size)
        batches = list(self.packing.batches(examples, layout, self.rank, chosen))
        if self.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        lengths = np.asarray([len(e.ids) for e in examples], dtype=np.int64)
        return StepBatches(chosen, lengths, self.rows.label_tokens(chosen), layout.computed_tokens, batches)


class StepLoader:
    """Loads the batches of step after step.

    Args:
        source: makes them.
        total_steps: of the run; nothing is made for later ones.
        prefetch: make the next step's batches in a thread; ``None``: where the device is a GPU, since on CPU the thread
            takes its time from the step.
    """

    def __init__(self, source: StepSource, total_steps: int, prefetch: bool | None = None) -> None:
        self.source, self.total_steps = source, total_steps
        self.prefetches = source.device.type == "cuda" if prefetch is None else prefetch
        self._next: tuple[int, Future[StepBatches]] | None = None
        self._thread: Thread | None = None

    def load(self, step: int) -> StepBatches:
        """Return the batches of a step, prefetched or made now, and start on the next step's.

        Raises:
            Exception: what making them raised, in the thread too.
        """
        future = self._next[1] if self._next is not None and self._next[0] == step else None
        self._next = None
        made = self.source.make(step) if future is None else future.result()
        if self.prefetches and step + 1 < self.total_steps:
            self._start(step + 1)
        return made

    def close(self) -> None:
        """Wait for the thread, if one is at work, and forget what it makes."""
        if self._thread is not None:
            self._thread.join()
        self._next = self._thread = None

    def _start(self, step: int) -> None:
        self.close()  # of a step that nobody asked for
        future: Future[StepBatches] = Future()
        self._next = step, future
        # A daemon: a read that hangs must not keep the process from ending.
        self._thread = Thread(target=self._make, args=(step, future), name="step batches", daemon=True)
        self._thread.start()

    def _make(self, step: int, future: Future[StepBatches]) -> None:
        """Make the batches of a step into ``future``; in the thread."""
        try:
            if self.source.device.type == "cuda":
                torch.cuda.set_device(self.source.device)  # each thread has its own, device 0 at first
            future.set_result(self.source.make(step))
        except BaseException as error:  # it is raised at the step that asks
            future.set_exception(error)
