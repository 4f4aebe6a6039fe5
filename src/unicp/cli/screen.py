"""Prints results on stdout, progress and messages on stderr. Without a terminal there are no control codes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from .. import progress

HEARTBEAT = 10.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


def results() -> Console:
    return Console(highlight=False, emoji=False)  # ":x:" may stand in a path or a prompt


def messages() -> Console:
    return Console(stderr=True, highlight=False, emoji=False)


class Steps:
    """Progress over the denoising steps of one video."""

    def __init__(self, console: Console, bar: Any, task: Any, title: str) -> None:
        self._console, self._bar, self._task, self._title = console, bar, task, title
        self._said = time.monotonic()

    def show(self, done: int, total: int, sigma: float | None, what: str) -> None:
        """Step ``done`` of ``total`` is over; ``what`` was done in it."""
        noise = "" if sigma is None else f"σ {sigma:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, noise=noise, what=what)
        elif time.monotonic() - self._said >= HEARTBEAT:
            self._said = time.monotonic()
            self._console.print(f"{self._title}: step {done}/{total}  {noise}  {what}", soft_wrap=True, markup=False)


@contextmanager
def steps(title: str, total: int | None) -> Iterator[Steps]:
    """A progress bar for one video; it vanishes at the end."""
    console = messages()
    if not console.is_terminal:
        yield Steps(console, None, None, title)
        return
    with progress.bar(console, ("{task.fields[noise]:<7}", "{task.fields[what]:<8}")) as bar:
        yield Steps(console, bar, bar.add_task(title, total=total, noise="", what=""), title)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows what is going on while nothing can be counted; the line vanishes at the end."""
    console = messages()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield


class Runs:
    """Progress over the runs of a comparison, with an estimate of the time left. It is a context manager."""

    def __init__(self) -> None:
        self._console = messages()
        self._bar: Any = None
        if self._console.is_terminal:
            self._bar = progress.bar(self._console, ("{task.fields[left]}",))
            self._task = self._bar.add_task("", total=None, left="")
        self._said = time.monotonic()

    def __enter__(self) -> Runs:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, at: Any) -> None:
        """``at`` is a :class:`unicp.bench.compare.Progress`."""
        left = "" if at.seconds_left is None else f"about {_duration(at.seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=at.done, total=at.total, description=at.what, left=left)
        elif time.monotonic() - self._said >= HEARTBEAT:
            self._said = time.monotonic()
            self._console.print(f"run {at.done}/{at.total}  {at.what}  {left}", soft_wrap=True, markup=False)


def _duration(seconds: float) -> str:
    """
    >>> _duration(42), _duration(200), _duration(7300)
    ('42 s', '3 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
