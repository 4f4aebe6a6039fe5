"""The engine on one machine: one process a device."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..errors import first_line
from .clips import Clip, Recipe
from .engines import DIED, MADE, READY, UNLOADABLE, Message, Setting
from .worker import Worker, is_broken

PATIENCE = 5.0
"""Seconds that a process has to end by itself."""


def _end_with_parent() -> None:
    """Ends this process when the driver is gone, even if it was killed: nobody would take its clips."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started in here never sees Ctrl-C, not even while it begins; ours comes afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, recipe: Recipe, folder: Path, stage: Path, device: str | None) -> None:
    """A worker's process: what it gets through the pipe are clips, what it sends is kinds and outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        worker = Worker(recipe, folder, stage, device)
    except Exception as error:
        pipe.send((UNLOADABLE, first_line(error)))
        return
    pipe.send((READY, ""))
    with contextlib.suppress(EOFError):
        while True:
            outcomes = worker.make(pipe.recv())
            pipe.send((MADE, outcomes))
            if is_broken(outcomes):
                return


class LocalEngine:
    """Processes of this machine.

    Args:
        devices: of the workers in turn, such as ``("cuda:0", "cuda:1")``.
    """

    def __init__(self, setting: Setting, devices: Sequence[str | None] = (None,)) -> None:
        self._setting, self._devices = setting, devices
        # Not forked: a process that has used a GPU cannot be.
        self._context = multiprocessing.get_context("spawn")
        self._pipes: dict[int, Connection] = {}
        self._processes: dict[int, BaseProcess] = {}
        self._idle: set[int] = set()

    def start(self) -> None:
        for worker in range(self._setting.workers):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        self._drop(worker)
        ours, theirs = self._context.Pipe()
        device = self._devices[worker % len(self._devices)]
        setting = self._setting
        process = self._context.Process(
            target=_serve, args=(theirs, setting.recipe, setting.folder, setting.stage, device), daemon=True
        )
        with _interrupts_blocked():
            process.start()
        theirs.close()  # else its end would not be seen
        self._pipes[worker], self._processes[worker] = ours, process

    def submit(self, worker: int, clips: Sequence[Clip]) -> None:
        self._idle.discard(worker)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; `wait` will say so
            self._pipes[worker].send(list(clips))

    def wait(self, seconds: float) -> list[Message]:
        numbers = {id(pipe): worker for worker, pipe in self._pipes.items()}
        messages = []
        for pipe in wait(list(self._pipes.values()), seconds):
            worker = numbers[id(pipe)]
            try:
                kind, content = self._pipes[worker].recv()
            except (EOFError, OSError):
                messages.append(Message(worker=worker, kind=DIED, error=self._drop(worker)))
                continue
            self._idle.add(worker)
            if kind == MADE:
                messages.append(Message(worker=worker, kind=MADE, outcomes=tuple(content)))
                if is_broken(content):
                    self._drop(worker)
                    messages.append(Message(worker=worker, kind=DIED, error="its GPU was left in error"))
            else:
                messages.append(Message(worker=worker, kind=kind, error=content))
                if kind == UNLOADABLE:
                    self._drop(worker)  # it ends by itself, which is no death to replace it after
        return messages

    def _drop(self, worker: int) -> str:
        """Forget a worker; how its process ended."""
        self._idle.discard(worker)
        pipe, process = self._pipes.pop(worker, None), self._processes.pop(worker, None)
        if pipe is not None:
            pipe.close()
        if process is None:
            return ""
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode or 0
        return (
            f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
        )

    def close(self) -> None:
        for worker, process in self._processes.items():
            if worker not in self._idle:
                process.terminate()
            self._pipes[worker].close()  # one that waits for clips ends by itself, and leaves nothing behind
        for worker in list(self._processes):
            self._drop(worker)
