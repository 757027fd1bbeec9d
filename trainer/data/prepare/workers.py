"""Encode rows in several worker processes, in order, within bounded memory.

Not ``multiprocessing``'s own pools: *fork* is unsafe once torch and OpenMP have threads, and *spawn* and *forkserver*
both import the parent's main module again, which under ``python -m trainer.train`` and torchrun is torch and DeepSpeed
in every worker. A worker here is a plain ``python -c`` with one socket. It ends when that socket does: however the
parent dies, none is left behind.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType

from trainer.data.prepare.encode import EncodedChunk, Encoder, EncodingSpec
from trainer.data.sources.rows import Chunk
from trainer.errors import DataError

WINDOW = 3  # chunks a worker that are read ahead: one it works on, one that waits for it, one that waits for its turn
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from trainer.data.prepare.workers import serve; serve({})"
)
_ENDED = (EOFError, ConnectionError)


def encode_chunks(chunks: Iterable[Chunk], spec: EncodingSpec, workers: int) -> Generator[EncodedChunk, None, None]:
    """Encode chunks in their order, whatever the number of processes; 1 works in this one.

    Raises:
        DataError: the template or the tokenizer cannot be used, or a worker died.
    """
    if workers == 1:
        yield from map(Encoder(spec).encode, chunks)
        return
    waiting: deque[Future[EncodedChunk]] = deque()
    with WorkerPool(spec, workers) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(chunk))
            if len(waiting) >= WINDOW * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    has_spec: bool = False


class WorkerPool:
    """Worker processes, each with a thread of ours that sends it one chunk at a time and waits for the answer."""

    def __init__(self, spec: EncodingSpec, workers: int) -> None:
        self._spec = pickle.dumps(spec)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="afina-data")
        self._workers = workers

    def __enter__(self) -> WorkerPool:
        try:
            for _ in range(self._workers):
                self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()  # a thread that waits for its answer then meets the end of the socket
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            with suppress(OSError):  # the garbage collector may have been there first
                self._idle.get().connection.close()
        for process in self._processes:
            process.wait()

    def submit(self, chunk: Chunk) -> Future[EncodedChunk]:
        """Queue a chunk for the next worker that is free."""
        return self._threads.submit(self._encode, chunk)

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(theirs.fileno()), json.dumps(sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
            )
        self._processes.append(process)
        self._idle.put(_Worker(process, ours))

    def _encode(self, chunk: Chunk) -> EncodedChunk:
        worker = self._idle.get()
        try:
            if not worker.has_spec:  # not sent at its start: it must be up to listen, and the others start meanwhile
                worker.connection.send_bytes(self._spec)
                worker.has_spec = True
            worker.connection.send(chunk)
            answer = worker.connection.recv()
        except _ENDED as error:
            raise _worker_died(worker.process) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, EncodedChunk)
        return answer


def serve(descriptor: int) -> None:
    """Run a worker: receive the specification, then a chunk at a time, until the other end of the socket is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals every process of a job; the parent decides
    connection = Connection(descriptor)
    with suppress(*_ENDED):
        encoder: Encoder | None = None
        spec: EncodingSpec = connection.recv()
        while True:
            chunk: Chunk = connection.recv()
            try:
                encoder = encoder or Encoder(spec)
                answer: EncodedChunk | DataError = encoder.encode(chunk)
            except DataError as error:
                answer = error
            connection.send(answer)


def _worker_died(process: subprocess.Popen[bytes]) -> DataError:
    code = process.wait()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (memory may have run out)" if code == -signal.SIGKILL else ""
    return DataError("data.workers", reason=f"a process that tokenises {how}{hint}", hint="data.workers=1")
