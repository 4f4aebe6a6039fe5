"""Shows a batch to a person: bars and workers on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from .clips import Outcome

HEARTBEAT = 10.0
"""Seconds between two lines where there is no terminal."""
REDRAW = 0.25
LINES = 20
"""Most failed clips that are reported as they fail; the manifest has all."""
WARNINGS = 5
"""Most different warnings that are shown for one batch."""
SHOWN_WORKERS = 16


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(42), duration(90), duration(2 * 3600 + 5 * 60)
    ('42 s', '1 min 30 s', '2 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


def counted(number: int, what: str) -> str:
    """
    >>> counted(1, "clip"), counted(3, "clip")
    ('1 clip', '3 clips')
    """
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


class Progress:
    """Counts clips, and shows the progress of a batch.

    Args:
        console: the console to print on; by default that of stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._workers: dict[int, tuple[str, str, float]] = {}
        self._total = self._found = self._made = self._failed = 0
        self._fractions: list[float] = []
        self._warned: Counter[str] = Counter()
        self._began: float | None = None
        self._shown = time.monotonic()
        self._live: Any = None

    @contextmanager
    def over(self, total: int, found: int) -> Iterator[None]:
        """Show progress over ``total`` clips, of which ``found`` are done already."""
        self._total, self._found = total, found
        if found:
            self.say(f"{found} of {total} clips are done already")
        if not self._console.is_terminal:
            yield
            return
        from rich.live import Live

        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def worker(self, number: int, state: str, clip: str = "", count: int = 1) -> None:
        """Show a worker's state, with the clip that it makes, the first of ``count``."""
        if state != "loading" and self._began is None:
            self._began = time.monotonic()  # loading a model says nothing of the rate
        what = f"{clip} and {count - 1} more" if count > 1 else clip
        self._workers[number] = (state, what, time.monotonic())

    def count(self, outcome: Outcome, name: str) -> None:
        """Count a clip that is made or has failed."""
        if outcome.error is None:
            self._made += 1
            if outcome.fraction is not None:
                self._fractions.append(outcome.fraction)
        else:
            self._failed += 1
            if self._failed <= LINES:
                more = "; those that follow are not shown" if self._failed == LINES else ""
                self.say(f"{name} failed: {outcome.error}{more}")
        for text in outcome.warnings:
            kind = re.sub(r"\d+(\.\d+)?", "#", text)  # the same warning with another figure
            self._warned[kind] += 1
            if self._warned[kind] == 1 and len(self._warned) <= WARNINGS:
                self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        self._console.print(text, markup=False, soft_wrap=True)

    def text(self) -> str:
        """The progress in one line."""
        done, ended = self._found + self._made, self._made + self._failed
        parts = [f"{done}/{self._total} clips"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        seconds = time.monotonic() - self._began if self._began is not None else 0.0
        if ended and seconds > 0:
            rate = ended / seconds
            parts.append(f"{60 * rate:.3g} a minute")
            parts.append(f"{duration((self._total - self._found - ended) / rate)} left")
        if self._fractions:
            parts.append(f"{sum(self._fractions) / len(self._fractions):.0%} of the operations")
        return ", ".join(parts)

    def lines(self) -> list[str]:
        """What the workers do, in one line each."""
        now = time.monotonic()
        shown = sorted(self._workers.items())[:SHOWN_WORKERS]
        # The name comes last, so that it is cut off first where the window is narrow.
        lines = [
            f"worker {number}: {state} {duration(now - since)}{f'  {clip}' if clip else ''}"
            for number, (state, clip, since) in shown
        ]
        more = len(self._workers) - len(shown)
        return [*lines, f"and {more} workers more"] if more else lines

    def show(self) -> None:
        """Draw if it is time to."""
        now = time.monotonic()
        if now - self._shown < (HEARTBEAT if self._live is None else REDRAW):
            return
        self._shown = now
        if self._live is None:
            states = Counter(state for state, _, _ in self._workers.values())
            workers = ", ".join(f"{count} {state}" for state, count in states.items())
            self.say(f"{self.text()}; workers: {workers}")
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        rows = [Text(line, no_wrap=True, overflow="ellipsis", style="dim") for line in self.lines()]
        bar = ProgressBar(total=max(1, self._total), completed=self._found + self._made)
        self._live.update(Group(Text(self.text()), *rows, bar), refresh=True)  # a bar ends no line
