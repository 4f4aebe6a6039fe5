"""The loop over all workers: it hands out clips, records their outcomes, and replaces workers that die."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..engine.report import readable_bytes
from ..errors import UnicpError
from . import manifest as states
from . import summary
from .clips import Clip, Outcome, Recipe, groups
from .engines import DIED, MADE, READY, Engine, Message, Setting
from .lock import Lock
from .manifest import Manifest
from .progress import Progress, counted
from .worker import is_broken

RETRIES = 2
"""How often a clip is tried again after the worker that was making it died."""
LOADS = 3
"""How often in a row workers may die before one has loaded the model."""
RESERVE = 64 * 2**20
"""Bytes that are left free on the disk."""
STAGE = "stage-"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a batch.

    Attributes:
        asked: number of clips that were asked for.
        found: number of these that were done before.
        made: number of clips that this run made.
        failed: errors by the clips' names.
        seconds: wall-clock seconds of this run.
        summary: path of the contact sheet.
    """

    asked: int
    found: int
    made: int
    failed: dict[str, str]
    seconds: float
    summary: Path


@dataclass
class Driver:
    """One run of a batch."""

    engine: Engine
    manifest: Manifest
    queue: deque[list[Clip]]
    progress: Progress
    retries: int = RETRIES
    failed: dict[str, str] = field(default_factory=dict)
    made: int = 0

    def __post_init__(self) -> None:
        self._busy: dict[int, list[Clip]] = {}
        self._idle: deque[int] = deque()
        self._gone: dict[int, str] = {}
        self._deaths: Counter[str] = Counter()
        self._failed_loads: Counter[int] = Counter()
        self._names = {clip.key: clip.name for group in self.queue for clip in group}
        self._largest = max((clip.expected_bytes for group in self.queue for clip in group), default=0)

    def run(self, workers: int) -> None:
        """Work until every clip is made or has failed.

        Raises:
            UnicpError: no worker can load the model, or the disk is full; what is done stays done.
        """
        for worker in range(workers):
            self.progress.worker(worker, "loading")
        self.engine.start()
        while self.queue or self._busy:
            self._hand_out()
            self.progress.show()
            for message in self.engine.wait(0.5):
                self._take(message)
            if len(self._gone) == workers:
                left = sum(map(len, self.queue))
                raise UnicpError(f"no worker is left, and {left} clips are to do: {next(iter(self._gone.values()))}")
        self.progress.show()

    def _hand_out(self) -> None:
        while self._idle and self.queue:
            if self._disk_is_full(self.queue[0]):
                if self._busy:
                    return  # they finish first
                left = sum(map(len, self.queue))
                raise UnicpError(
                    f"the disk of {self.manifest.folder} is nearly full, {left} clips are to do; free some space and "
                    "run it again"
                )
            worker, clips = self._idle.popleft(), self.queue.popleft()
            self._busy[worker] = clips
            self.manifest.start([clip.key for clip in clips], worker)
            self.progress.worker(worker, "making", clips[0].name, len(clips))
            self.engine.submit(worker, clips)

    def _disk_is_full(self, clips: Sequence[Clip]) -> bool:
        coming = len(clips) + sum(map(len, self._busy.values()))
        return shutil.disk_usage(self.manifest.folder).free < RESERVE + 2 * coming * self._largest

    def _take(self, message: Message) -> None:
        worker = message.worker
        if message.kind == READY:
            self._failed_loads[worker] = 0
            self._rest(worker)
        elif message.kind == MADE:
            clips = self._busy.pop(worker)
            if len(clips) > 1 and is_broken(message.outcomes):
                self._retry(clips)  # one of them left the GPU in error; the others have done nothing
            else:
                self._note(message.outcomes)
            self._rest(worker)
        elif message.kind == DIED:
            if worker in self._idle:
                self._idle.remove(worker)
            else:
                self._bury(worker, message.error)
            if self._failed_loads[worker] < LOADS:
                self.progress.worker(worker, "loading")
                self.engine.restart(worker)
            else:
                self._leave(worker, f"a worker died {LOADS} times while it loaded the model: {message.error}")
        else:
            self._leave(worker, message.error)

    def _rest(self, worker: int) -> None:
        self._idle.append(worker)
        self.progress.worker(worker, "idle")

    def _leave(self, worker: int, why: str) -> None:
        self._gone[worker] = why
        self.progress.worker(worker, "gone")
        self.progress.say(f"worker {worker} is gone: {why}")

    def _bury(self, worker: int, why: str) -> None:
        """Try the clips of a worker that died again, each alone, since one of them may have killed it."""
        clips = self._busy.pop(worker, None)
        if clips is None:
            self._failed_loads[worker] += 1
            return
        self.progress.say(f"worker {worker} died: {why}; it is replaced")
        for clip in clips:
            self._deaths[clip.key] += 1
            if self._deaths[clip.key] > self.retries:
                text = f"the worker that made it died, {counted(self._deaths[clip.key], 'time')}: {why}"
                self._note([Outcome(key=clip.key, error=text)])
            else:
                self._retry([clip])

    def _retry(self, clips: Sequence[Clip]) -> None:
        """Put clips at the end of the queue, each alone."""
        self.manifest.release([clip.key for clip in clips])
        self.queue.extend([clip] for clip in clips)

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        self.manifest.finish(outcomes)
        for outcome in outcomes:
            if outcome.error is None:
                self.made += 1
                self._largest = max(self._largest, outcome.bytes)
            else:
                self.failed[self._names[outcome.key]] = outcome.error
            self.progress.count(outcome, self._names[outcome.key])


def check_disk(folder: Path, clips: Sequence[Clip], manifest: Manifest) -> None:
    """Refuse a batch that would fill the disk.

    Raises:
        UnicpError: with what it needs: as much a clip as those before took, else what clips are expected to take.
    """
    sizes = [entry.bytes for entry in manifest.entries() if entry.state == states.DONE and entry.bytes]
    each = sum(sizes) / len(sizes) if sizes else None
    needed = sum(clip.expected_bytes if each is None else each for clip in clips)
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise UnicpError(
            f"{len(clips)} clips take about {readable_bytes(needed)}, and {readable_bytes(free)} are free on the disk "
            f"of {folder}; free some space, or name another folder with -o"
        )


def run(
    clips: Sequence[Clip],
    folder: Path,
    recipe: Recipe,
    make_engine: Callable[[Setting], Engine],
    *,
    workers: int = 1,
    batch_size: int = 1,
    retries: int = RETRIES,
    resume: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Make all clips that are not done yet.

    Args:
        clips: clips with different keys and names.
        folder: folder for their files; it is made if it is missing.
        make_engine: makes the engine; called only if there is something to do.
        workers: most workers; there are never more than groups of clips.
        batch_size: most clips of one group that are made in one forward.
        retries: how often a clip is tried again after its worker died.
        resume: leave clips that are done; ``False`` makes them again.

    Raises:
        UnicpError: another batch works on the folder, its disk is too full, or the model cannot be loaded.
    """
    began = time.monotonic()
    folder = folder.absolute()
    private = states.prepare(folder)
    with Lock(private):
        for old in private.glob(f"{STAGE}*"):  # of batches that were killed
            shutil.rmtree(old, ignore_errors=True)
        stage = private / f"{STAGE}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        stage.mkdir()
        manifest = Manifest(folder)
        try:
            manifest.plan(clips)
            todo = manifest.recover(clips, resume=resume)
            check_disk(folder, todo, manifest)
            failed: dict[str, str] = {}
            if todo:
                queue = deque(groups(todo, batch_size))
                workers = min(workers, len(queue))
                progress = progress or Progress()
                setting = Setting(recipe=recipe, folder=folder, stage=stage, workers=workers)
                engine = make_engine(setting)
                driver = Driver(engine, manifest, queue, progress, retries)
                try:
                    with progress.over(len(clips), len(clips) - len(todo)):
                        driver.run(workers)
                finally:
                    engine.close()
                failed = driver.failed
            sheet = summary.write(manifest)
        finally:
            running = [entry.key for entry in manifest.entries() if entry.state == states.RUNNING]
            manifest.release(running)
            manifest.close()
            shutil.rmtree(stage, ignore_errors=True)
    return Result(
        asked=len(clips),
        found=len(clips) - len(todo),
        made=len(todo) - len(failed),
        failed=failed,
        seconds=time.monotonic() - began,
        summary=sheet,
    )
