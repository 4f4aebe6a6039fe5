"""The engine on a Ray cluster, or on a Ray of this machine: one actor per worker, placed by Ray."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..errors import UnicpError, first_line, missing_extra
from .clips import Clip, Outcome, Recipe
from .engines import DIED, MADE, READY, UNLOADABLE, Message, Setting
from .ranks import Ranks
from .worker import Worker, is_broken


class RayWorker:
    """An actor. Its model is loaded by :meth:`load`, so that what loading raises can be told from a death.

    Where several processes make each clip together, the actor starts them, and computes nothing itself.
    """

    def __init__(self, recipe: Recipe, folder: str, stage: str, devices: Sequence[str | None]) -> None:
        self._common, self._devices = (recipe, Path(folder), Path(stage)), devices
        self._worker: Worker | None = None
        self._ranks: Ranks | None = None

    def load(self) -> str:
        """Load the model. Returns why it could not be loaded, or nothing."""
        if len(self._devices) > 1:
            self._ranks = Ranks(*self._common, self._devices)
            kind, content = self._next(self._ranks)[0]
            if kind == DIED:
                raise RuntimeError(content)
            return str(content)
        try:
            self._worker = Worker(*self._common, self._devices[0])
        except Exception as error:
            return first_line(error)
        return ""

    def make(self, clips: Sequence[Clip]) -> tuple[list[Outcome], str]:
        """Make clips. Returns their outcomes, and why this worker has to be replaced, or nothing."""
        if self._ranks is not None:
            self._ranks.submit(clips)
            told = dict(self._next(self._ranks))
            if MADE not in told:
                raise RuntimeError(told[DIED])
            return list(told[MADE]), told.get(DIED, "")
        assert self._worker is not None
        outcomes = self._worker.make(clips)
        return outcomes, "its GPU was left in error" if is_broken(outcomes) else ""

    @staticmethod
    def _next(ranks: Ranks) -> list[tuple[str, Any]]:
        while not (told := ranks.receive()):
            wait(ranks.pipes, 0.5)
        return told


def connect(address: str | None, cpus: int | None = None) -> Any:
    """Ray, connected.

    Args:
        address: of a cluster: ``auto``, or ``ray://HOST:10001``; ``None`` starts a Ray on this machine that ends with
            this process.
        cpus: what such a Ray is to believe that this machine has; ``None`` counts them.

    Raises:
        UnicpError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray", "batches on --engine ray") from None
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # "local": not the cluster that RAY_ADDRESS or an earlier `ray start` would name.
            ray.init(address="local", include_dashboard=False, num_cpus=cpus, **quiet)
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        raise UnicpError(
            f"no Ray at {address or 'this machine'}: {first_line(error)}; start one with: ray start --head"
        ) from error
    return ray


def worker_count(ray: Any, gpus: float) -> int:
    """How many workers with ``gpus`` GPUs each fit into the cluster; one if workers need no GPU."""
    there = ray.cluster_resources().get("GPU", 0.0)
    if gpus > there:
        raise UnicpError(f"--gpus-per-worker {gpus:g}: the Ray cluster has {there:g} GPUs; use 0 for workers on CPUs")
    return max(1, int(there / gpus)) if gpus else 1


class RayEngine:
    """Runs workers as Ray actors. Ray places them; a dead one is replaced by another, wherever there is room.

    Args:
        ray: what :func:`connect` returned.
        cpus, gpus: CPUs and GPUs of a worker; fractions are possible.
        devices: devices of a worker, one for each of its processes; ``None`` is the first that Ray lets it see.
    """

    def __init__(
        self,
        setting: Setting,
        ray: Any,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        devices: Sequence[str | None] = (None,),
    ) -> None:
        self._setting, self._ray, self._devices = setting, ray, devices
        self._options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}
        self._actors: dict[int, Any] = {}
        self._due: dict[Any, tuple[int, str]] = {}

    def start(self) -> None:
        for worker in range(self._setting.workers):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        self._drop(worker)
        setting = self._setting
        actor = (
            self._ray.remote(RayWorker)
            .options(**self._options)
            .remote(setting.recipe, str(setting.folder), str(setting.stage), self._devices)
        )
        self._actors[worker] = actor
        self._due[actor.load.remote()] = (worker, READY)

    def submit(self, worker: int, clips: Sequence[Clip]) -> None:
        self._due[self._actors[worker].make.remote(list(clips))] = (worker, MADE)

    def wait(self, seconds: float) -> list[Message]:
        if not self._due:
            return []
        first, others = self._ray.wait(list(self._due), num_returns=1, timeout=seconds)
        more = self._ray.wait(others, num_returns=len(others), timeout=0)[0] if first and others else []
        return [message for done in (*first, *more) if done in self._due for message in self._receive(done)]

    def _receive(self, done: Any) -> list[Message]:
        worker, kind = self._due.pop(done)
        try:
            content = self._ray.get(done)
        except self._ray.exceptions.RayError as error:
            self._drop(worker)
            cause = getattr(error, "cause", None)  # of what our own code raised
            return [Message(worker=worker, kind=DIED, error=str(cause) if cause else first_line(error))]
        if kind == READY:
            return [Message(worker=worker, kind=UNLOADABLE if content else READY, error=content)]
        outcomes, broken = content
        made = [Message(worker=worker, kind=MADE, outcomes=tuple(outcomes))]
        if broken:
            self._drop(worker)
            made.append(Message(worker=worker, kind=DIED, error=broken))
        return made

    def _drop(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        self._due = {due: about for due, about in self._due.items() if about[0] != worker}
        if actor is not None:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def close(self) -> None:
        for worker in list(self._actors):
            self._drop(worker)
