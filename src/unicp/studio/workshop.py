"""Makes the videos of all pages one after another, in a thread of its own; each can be cancelled."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..bench.harness import Made, generate
from ..errors import UnicpError, UnicpWarning, first_line
from ..tensors import metrics
from .job import CANCELLED, DONE, FAILED, FAST, LOADING, PLAIN, WARMING, Cancelled, Job, Result
from .request import Backend, Prepared, Request

WARM_UP_STEPS = 2
"""Denoising steps of a warm-up before a model's first video, so that one-time costs count for neither video."""
KEPT_BYTES = 2**30
"""Most bytes of unaccelerated videos that are kept, so that another method or speed needs only its own video."""
LOG = logging.getLogger(__name__)


class Workshop:
    """Makes the videos of all pages, one at a time: two at once would slow each other down and falsify the times."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._jobs: queue.Queue[Job] = queue.Queue()
        self._waiting: list[Job] = []
        self._lock = threading.Lock()
        self._plain: OrderedDict[tuple[str, ...], Made] = OrderedDict()
        self._warm: Any = None
        threading.Thread(target=self._work, name="unicp studio", daemon=True).start()

    def submit(self, request: Request) -> Job:
        job = Job(request)
        with self._lock:
            self._waiting.append(job)
        self._jobs.put(job)
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs come before this one, including the one in progress."""
        with self._lock:
            return self._waiting.index(job) if job in self._waiting else 0

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job.result = self._make(job)
                job.enter(DONE)
            except Cancelled:
                job.enter(CANCELLED)
            except UnicpError as error:
                job.error = str(error)
                job.enter(FAILED)
            except Exception as error:  # the page is told of any error, and the next job is made
                LOG.exception("a video could not be made")
                job.error = _sentence(error)
                job.enter(FAILED)
            finally:
                with self._lock:
                    self._waiting.remove(job)

    def _make(self, job: Job) -> Result:
        job.check()
        job.enter(LOADING)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnicpWarning)
            prepared = self.backend.prepare(job.request)
            job.check()
            if self._warm is not prepared.pipe:
                self._plain.clear()
                job.enter(WARMING)
                self._generate(job, prepared, None, {"num_inference_steps": WARM_UP_STEPS})
                self._warm = prepared.pipe
            key = (job.request.prompt, repr(prepared.call), str(job.request.seed))
            kept = self._plain.get(key)
            if kept is None:
                job.enter(PLAIN)
                plain = self._keep(key, self._generate(job, prepared, None))
            else:
                plain = kept
            job.enter(FAST)
            made = self._generate(job, prepared, job.request.config)
        said = [str(each.message) for each in caught if issubclass(each.category, UnicpWarning)]
        notes = [*prepared.notes, *said, *(made.report.notes if made.report is not None else ())]
        return Result(
            request=job.request,
            prepared=prepared,
            made=made,
            plain=plain,
            kept=kept is not None,
            psnr=metrics.psnr(made.frames, plain.frames),
            ssim=metrics.ssim(made.frames, plain.frames),
            motion_ratio=metrics.motion_ratio(made.frames, plain.frames),
            notes=tuple(dict.fromkeys(notes)),
        )

    def _generate(self, job: Job, prepared: Prepared, config: Any, changes: Mapping[str, Any] | None = None) -> Made:
        from ..hosts.diffusers.session import accelerate

        with ExitStack() as stack:
            session = stack.enter_context(accelerate(prepared.pipe, config)) if config is not None else None

            def show(_: Any, done: int, total: int) -> None:
                job.steps, job.total = done, total
                job.records = session.records if session is not None else ()
                job.check()

            call = {"prompt": job.request.prompt, **prepared.call, **(changes or {})}
            made = generate(prepared.pipe, call, seed=job.request.seed, on_step=show)
            job.check()
            return made if session is None else dataclasses.replace(made, report=session.report())

    def _keep(self, key: tuple[str, ...], made: Made) -> Made:
        self._plain[key] = made
        while len(self._plain) > 1 and sum(each.frames.nbytes for each in self._plain.values()) > KEPT_BYTES:
            self._plain.popitem(last=False)
        return made


def _sentence(error: Exception) -> str:
    text = first_line(error)
    if "out of memory" in text.lower():
        return f"{text}. Ask for a smaller size, or for fewer frames."
    return f"{text}. The terminal in which unicp studio runs has the details."
