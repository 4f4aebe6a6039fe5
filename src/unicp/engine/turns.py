"""Whose turn is it? One video at a time is accelerated on a model, of whichever thread."""

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
        heard: calls of the other thread's that had come when it last did.
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
    """Threads that share a model: the one whose video is in progress has the turn, and the others do not wait for it.

    A thread gets the turn where a video of its own begins, and the one in progress is over, or its thread is, or
    nothing was heard of it for a whole video: it may have broken off.

    Args:
        over: whether the video in progress is.
        end: ends it where it broke off.
    """

    def __init__(self, over: Callable[[], bool], end: Callable[[], None]) -> None:
        self._over, self._end = over, end
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._calls = 0  # of the owner
        self._busy = False  # a call of the owner is in progress, in which nobody else gets the turn
        self._guests: dict[int, _Guest] = {}

    def here(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    def in_turn(self, act: Callable[[], None]) -> None:
        """Do something if this thread has the turn, and let no other one get it meanwhile."""
        with self._lock:
            if self.here():
                act()

    def take(self, name: str, make_clock: Callable[[], Clock], context: Any, call: Mapping[str, Any]) -> bool:
        """Whether a call is of the thread that has the turn, or that gets it now.

        Args:
            name: of the denoiser.
            make_clock: a clock like the denoiser's.
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
        """The call that :meth:`take` was asked for is over."""
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
