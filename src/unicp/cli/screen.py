"""What is shown: results on stdout, progress and messages on stderr. Without a terminal, no control codes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

HEARTBEAT = 10.0
"""Seconds between two lines of progress where there is no terminal to draw a bar on."""


def results() -> Console:
    return Console(highlight=False)


def messages() -> Console:
    return Console(stderr=True, highlight=False)


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
    """A progress bar for one video; it is gone at the end."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = messages()
    if not console.is_terminal:
        yield Steps(console, None, None, title)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[noise]:<7}"),
        TextColumn("{task.fields[what]:<8}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        yield Steps(console, bar, bar.add_task(title, total=total, noise="", what=""), title)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Says what is going on while nothing can be counted; gone at the end."""
    console = messages()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        yield
