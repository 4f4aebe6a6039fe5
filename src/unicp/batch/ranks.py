"""The processes of one worker: one, or several (ranks) that make each clip together, each on a device of its own.

Every rank is given every clip and makes the same call; rank 0 writes the files. Clips go through a pipe to each rank
and not through the ranks' own group: ranks that wait for a clip must not run into the time limit of that group.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..errors import first_line
from .clips import Clip, Outcome, Rank, Recipe
from .engines import DIED, MADE, READY, UNLOADABLE
from .worker import Worker, is_broken

PATIENCE = 5.0
"""Seconds that a process has to end by itself."""
IDLE_PATIENCE = 60.0
"""The same for one that waits for clips: it gives a model's memory back first, and if killed it leaves semaphores."""
GRACE = 60.0
"""Seconds that the other ranks have to finish after one has failed; they might wait for it for ever."""


def _end_with_parent(rank: Rank | None) -> None:
    """End this process when its parent is gone, even if that was killed: nobody would take its clips."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        if rank is not None:
            shutil.rmtree(Path(rank.meeting).parent, ignore_errors=True)
        os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes within the block that never see Ctrl-C, not even at first; ours is delivered afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, recipe: Recipe, folder: Path, stage: Path, device: str | None, rank: Rank | None) -> None:
    """The main function of a worker's process: it receives clips through the pipe, and sends kinds and outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    threading.Thread(target=_end_with_parent, args=(rank,), daemon=True).start()
    try:
        worker = Worker(recipe, folder, stage, device, rank)
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


class Ranks:
    """A worker's processes, as their parent sees them. They load the model at once.

    Args:
        devices: device of each process; ``None`` leaves it the choice.
    """

    def __init__(self, recipe: Recipe, folder: Path, stage: Path, devices: Sequence[str | None]) -> None:
        # Not forked: a process that has used a GPU cannot be.
        context = multiprocessing.get_context("spawn")
        self._meeting = Path(tempfile.mkdtemp(prefix="unicp-")) if len(devices) > 1 else None
        self._pipes: dict[int, Connection] = {}
        self._processes: list[BaseProcess] = []
        self._answers: dict[int, Sequence[Outcome]] = {}
        self._clips: Sequence[Clip] = ()
        self._failed_at: float | None = None
        try:
            for number, device in enumerate(devices):
                rank = None
                if self._meeting is not None:
                    rank = Rank(number=number, size=len(devices), meeting=str(self._meeting / "store"))
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, recipe, folder, stage, device, rank), daemon=True
                )
                with _interrupts_blocked():
                    process.start()
                theirs.close()  # otherwise we would not notice that the process has ended
                self._pipes[number] = ours
                self._processes.append(process)
        except BaseException:
            self.end()
            raise

    @property
    def pipes(self) -> list[Connection]:
        """The connections to wait for."""
        return list(self._pipes.values())

    @property
    def pids(self) -> list[int | None]:
        """The processes of all ranks, in order."""
        return [process.pid for process in self._processes]

    def submit(self, clips: Sequence[Clip]) -> None:
        """Give clips to all ranks, which are ready and have none."""
        self._clips = list(clips)
        for pipe in self._pipes.values():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; `receive` will say so
                pipe.send(self._clips)

    def receive(self) -> list[tuple[str, Any]]:
        """The news of the worker: kinds of :class:`~unicp.batch.engines.Message`, and outcomes or an error.

        Does not wait. After ``died`` and ``unloadable`` its processes have ended.
        """
        for number, pipe in list(self._pipes.items()):
            try:
                if not pipe.poll():
                    continue
                kind, content = pipe.recv()
            except (EOFError, OSError):
                del self._pipes[number]
                pipe.close()
                if is_broken(self._answers.get(number, ())):
                    continue  # it ended by itself, and the others' answers are still to come
                return [(DIED, self.end(dead=number))]
            if kind == UNLOADABLE:
                self.end()
                return [(UNLOADABLE, content)]
            self._answers[number] = content
            if kind == MADE and self._failed_at is None and _errors(content):
                self._failed_at = time.monotonic()
            if len(self._answers) == len(self._processes):
                return self._all_made() if kind == MADE else self._all_ready()
        if self._failed_at is not None and time.monotonic() > self._failed_at + GRACE:
            return self._out_of_step(f"{GRACE:.0f} s after one of its ranks had failed, others still waited for it")
        return []

    def _all_ready(self) -> list[tuple[str, Any]]:
        self._answers = {}
        return [(READY, "")]

    def _all_made(self) -> list[tuple[str, Any]]:
        said = [_errors(outcomes) for outcomes in self._answers.values()]
        # Each call to another rank needs all of them: where one came through, none is left behind, and where all fail
        # with the same words, they did so at the same place.
        if any(not errors for errors in said) or all(errors == said[0] for errors in said):
            own, broken = self._answers[0], any(is_broken(outcomes) for outcomes in self._answers.values())
            self._answers, self._failed_at = {}, None
            if not broken:
                return [(MADE, own)]
            self.end()
            return [(MADE, own), (DIED, "its GPU, or the connection of its ranks, was left in error")]
        return self._out_of_step("its ranks failed differently, and could not go on together")

    def _out_of_step(self, why: str) -> list[tuple[str, Any]]:
        """Fail the clips with the error of the rank that failed first, and ask for another worker."""
        number, errors = next((number, _errors(each)) for number, each in self._answers.items() if _errors(each))
        text = f"rank {number}: {errors[0]}"
        self.end()
        return [(MADE, [Outcome(key=clip.key, error=text) for clip in self._clips]), (DIED, why)]

    def release(self, *, idle: bool = False) -> None:
        """Let all processes go, without waiting for their end.

        Args:
            idle: they wait for clips; they end by themselves then, and leave nothing behind.
        """
        for pipe in self._pipes.values():
            pipe.close()
        self._pipes = {}
        if not idle:
            for process in self._processes:
                process.terminate()

    def end(self, dead: int | None = None, *, idle: bool = False) -> str:
        """End all processes. Returns how the rank ``dead``, which had ended already, did so."""
        if dead is not None:
            self._processes[dead].join(PATIENCE)
        code = None if dead is None else self._processes[dead].exitcode
        self.release(idle=idle)
        for process in self._processes:
            process.join(IDLE_PATIENCE if idle else PATIENCE)
            if process.exitcode is None:
                process.kill()
                process.join()
        if self._meeting is not None:
            shutil.rmtree(self._meeting, ignore_errors=True)
        whose = "its process" if self._meeting is None else f"the process of its rank {dead}"
        code = code or 0
        return f"{whose} was ended by {signal.Signals(-code).name}" if code < 0 else f"{whose} ended with {code}"


def _errors(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.error for outcome in outcomes if outcome.error is not None]
