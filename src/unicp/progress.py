"""Progress of long work, shown on standard error: one bar for all verbs and functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def bar(console: Any, fields: tuple[str, ...] = (), expand: bool = True) -> Any:
    """A bar of rich that vanishes at the end; ``fields`` are templates of what stands behind the counts."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None if expand else 40),
        MofNCompleteColumn(),
        *(TextColumn(field, markup=False) for field in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, expand=expand)


@contextmanager
def progress_bar(
    progress: bool | Callable[[str, int, int], None], verb: str, first: str | None = None
) -> Iterator[Callable[[str, int, int], None]]:
    """Something that shows progress: what is done, how many, of how many; and says something first.

    Args:
        progress: whether to show it, or what is to be told instead.
        verb: what is being done.
        first: a sentence ahead.
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda *_: None
        return
    from rich.console import Console

    with bar(Console(file=sys.stderr)) as shown:
        if first is not None:
            shown.console.print(first)
        task = shown.add_task(verb)
        yield lambda what, done, count: shown.update(task, description=f"{verb}, {what}", completed=done, total=count)
