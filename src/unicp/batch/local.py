"""The engine on one machine: one process per device, or several for each worker."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import wait

from .clips import Clip
from .engines import DIED, MADE, UNLOADABLE, Message, Setting
from .ranks import Ranks


class LocalEngine:
    """Runs workers as processes of this machine.

    Args:
        devices: devices that workers take in turn, such as ``("cuda:0", "cuda:1")``.
        ranks: number of processes of each worker, which make each clip together; each takes the next device.
    """

    def __init__(self, setting: Setting, devices: Sequence[str | None] = (None,), ranks: int = 1) -> None:
        self._setting, self._devices, self._ranks = setting, devices, ranks
        self._workers: dict[int, Ranks] = {}
        self._idle: set[int] = set()

    def start(self) -> None:
        for worker in range(self._setting.workers):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        self._drop(worker)
        places = range(worker * self._ranks, (worker + 1) * self._ranks)
        devices = [self._devices[place % len(self._devices)] for place in places]
        setting = self._setting
        self._workers[worker] = Ranks(setting.recipe, setting.folder, setting.stage, devices)

    def submit(self, worker: int, clips: Sequence[Clip]) -> None:
        self._idle.discard(worker)
        self._workers[worker].submit(clips)

    def wait(self, seconds: float) -> list[Message]:
        wait([pipe for ranks in self._workers.values() for pipe in ranks.pipes], seconds)
        messages = []
        for worker, ranks in list(self._workers.items()):
            for kind, content in ranks.receive():
                if kind in (DIED, UNLOADABLE):
                    self._drop(worker)
                else:
                    self._idle.add(worker)
                if kind == MADE:
                    messages.append(Message(worker=worker, kind=MADE, outcomes=tuple(content)))
                else:
                    messages.append(Message(worker=worker, kind=kind, error=content))
        return messages

    def _drop(self, worker: int) -> None:
        """End a worker's processes, if there are any."""
        ranks = self._workers.pop(worker, None)
        if ranks is not None:
            ranks.end(idle=worker in self._idle)
        self._idle.discard(worker)

    def close(self) -> None:
        for worker, ranks in self._workers.items():
            ranks.release(idle=worker in self._idle)
        for worker in list(self._workers):
            self._drop(worker)
