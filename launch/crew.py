"""What trials run on: a device and a share of the cores for each of those that run at once, and what starts them."""

from __future__ import annotations

import logging
import queue
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import process
from launch.environment import ONE_RUNS_OWN, child_environment, gpu_names
from launch.trial_server import CannotFork, TrialServer
from trainer.errors import TRIAL

logger = logging.getLogger(__name__)


class Crew:
    """Runs trials of one process each, as many at once as there are threads that ask; each on a device of its own.

    Args:
        at_once: how many run at once; more than one print into files beside their run folders, not here.
        forks: start them as forks of one process, in which the libraries are loaded once.
    """

    def __init__(self, at_once: int = 1, forks: bool = True) -> None:
        gpus = gpu_names()
        self.is_quiet = at_once > 1
        self._gpus = len(gpus)
        self._at_once = at_once
        self._devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for number in range(at_once):
            self._devices.put(gpus[number] if self.is_quiet and gpus else None)
        self._server = TrialServer(self._environment()) if forks else None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()

    def run(self, arguments: Sequence[str], folder: Path) -> tuple[int, Path | None]:
        """Run one trial to its end, on a device that is free.

        Args:
            arguments: of `trainer.train`.
            folder: its run folder.

        Returns:
            its exit code, as :func:`launch.process.run`, and the file that it has printed into, if it has.

        Raises:
            LaunchError: it died without a word of why in its run folder.
        """
        output = folder.with_name(f"{folder.name}.log") if self.is_quiet else None
        with self._device() as variables:
            if (server := self._server) is not None:
                try:
                    return server.run(arguments, folder, variables, output), output
                except CannotFork as reason:
                    logger.info(f"each trial loads the libraries itself: {reason}")
                    self._server = None
            command = [sys.executable, "-m", "trainer.train", *arguments]
            return process.run(command, {**self._environment(), **variables}, folder, output), output

    @contextmanager
    def _device(self) -> Iterator[dict[str, str]]:
        """Take a free device inside the ``with`` block; yield the variables that show it alone to a trial."""
        device = self._devices.get()
        try:
            yield {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        finally:
            self._devices.put(device)

    def _environment(self) -> dict[str, str]:
        variables = child_environment(self._at_once, self._gpus)
        return {name: value for name, value in variables.items() if name not in ONE_RUNS_OWN} | {TRIAL: "1"}
