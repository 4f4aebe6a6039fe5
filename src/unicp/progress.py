"""Shows the progress of long work on standard error: one bar for all verbs and functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def bar(console: Any, fields: tuple[str, ...] = (), expand: bool = True) -> Any:
    """A progress bar that vanishes at the end.

    Args:
        console: the console of rich that shows it.
        fields: templates of the columns after the counts.
        expand: whether it takes the full width.
    """
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
    """A function that shows progress, given what is being done, how many are done, and of how many.

    Args:
        progress: whether to show a bar, or a function to call instead.
        verb: the name of the work, for the bar.
        first: a sentence to print before the bar.
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
