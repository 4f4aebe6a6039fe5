"""Threads that share a model take turns: one video at a time is accelerated on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .clock import Clock


@dataclass
class _Guest:
    """A thread whose videos are computed while that of another one is in progress.

    Attributes:
        clocks: tell when it begins a video; one for each denoiser, by name.
        heard: number of calls by the other thread when this one last began a video.
    """

    clocks: dict[str, Clock] = field(default_factory=dict)
    heard: int = -1

    def begins(self, name: str, make_clock: Callable[[], Clock], context: Any, call: Mapping[str, Any]) -> bool:
        """Whether a call is the first one of a video."""
        if name not in self.clocks:
            self.clocks[name] = make_clock()
            for mine, clock in self.clocks.items():
                clock.beside = [other for theirs, other in self.clocks.items() if theirs != mine]
        tick = self.clocks[name].tick(context, call)
        return tick.new_generation and tick.step.index == tick.step.began


class Turns:
    """Gives the turn to one of the threads that share a model. The others do not wait: they run the plain model.

    A thread gets the turn when it begins a video, provided that the video in progress is over, or its thread has ended,
    or its thread made no call for the length of a whole video and so may have broken off.

    Args:
        over: whether the video in progress is over.
        end: ends the video in progress where it broke off.
    """

    def __init__(self, over: Callable[[], bool], end: Callable[[], None]) -> None:
        self._over, self._end = over, end
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._calls = 0  # by the owner
        self._busy = False  # a call by the owner is in progress, during which nobody else gets the turn
        self._guests: dict[int, _Guest] = {}

    def here(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    def in_turn(self, act: Callable[[], None]) -> None:
        """Call ``act`` if this thread has the turn; no other thread gets the turn meanwhile."""
        with self._lock:
            if self.here():
                act()

    def take(self, name: str, make_clock: Callable[[], Clock], context: Any, call: Mapping[str, Any]) -> bool:
        """Whether the calling thread has the turn, or gets it now. :meth:`done` has to follow if it does.

        Args:
            name: name of the denoiser.
            make_clock: makes a clock like the denoiser's.
            context, call: as for :meth:`Clock.tick`.
        """
        thread = threading.get_ident()
        with self._lock:
            if thread != self._owner and not self._may_begin(thread, name, make_clock, context, call):
                return False
            if thread != self._owner and not self._over():
                self._end()
            self._owner = thread
            self._calls += 1
            self._busy = True
            self._guests.pop(thread, None)
            return True

    def done(self) -> None:
        """Note that the call for which :meth:`take` returned ``True`` is over."""
        self._busy = False

    def _may_begin(
        self, thread: int, name: str, make_clock: Callable[[], Clock], context: Any, call: Mapping[str, Any]
    ) -> bool:
        """Whether a thread without the turn gets it."""
        guest = self._guests.get(thread)
        if guest is None:
            alive = {each.ident for each in threading.enumerate()}
            if self._owner not in alive or (not self._busy and self._over()):
                return True
            self._guests = {known: each for known, each in self._guests.items() if known in alive}
            guest = self._guests[thread] = _Guest()
        begins, quiet = guest.begins(name, make_clock, context, call), guest.heard == self._calls
        if begins:
            guest.heard = self._calls
        return begins and not self._busy and (quiet or self._over())
