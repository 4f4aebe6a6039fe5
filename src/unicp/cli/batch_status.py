"""``unicp batch status DIR`` shows the state of a batch, from its manifest."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path

from ..batch import lock
from ..batch.manifest import DONE, FAILED, PRIVATE_FOLDER, RUNNING, STATES, Manifest
from ..batch.progress import duration
from ..errors import UnicpError
from .screen import results

MAX_LISTED = 20
"""Most failed clips that are listed."""


def status(arguments: Sequence[str], output: Path | None) -> None:
    """Print the state of the batch in a folder; it may be running.

    Raises:
        UnicpError: no folder is named, or there is no batch in it.
    """
    folders = [Path(argument) for argument in arguments] + ([output] if output is not None else [])
    if len(folders) != 1:
        raise UnicpError("name one folder, as in: unicp batch status videos/")
    folder = folders[0]
    manifest = Manifest(folder, readonly=True)
    try:
        entries, counts = manifest.entries(), manifest.counts()
    finally:
        manifest.close()
    screen = results()
    said = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    screen.print(f"{folder}: {said or 'no clips'}", markup=False, soft_wrap=True)
    fractions = [entry.fraction for entry in entries if entry.state == DONE and entry.fraction is not None]
    if fractions:
        screen.print(f"{sum(fractions) / len(fractions):.0%} of the denoiser's operations computed, on average")
    holder = lock.owner(folder / PRIVATE_FOLDER)
    alive = lock.is_alive(holder)
    if alive is False:
        rest = len(entries) - counts[DONE]
        screen.print("no batch is running here" + ("; run the same command again for the rest" if rest else ""))
    else:
        screen.print(f"{'running' if alive else 'perhaps running'}: {lock.describe(holder)}", markup=False)
        began = datetime.datetime.fromisoformat(str(holder["since"])).timestamp() if holder else time.time()
        ended = sum(entry.updated >= began for entry in entries if entry.state in (DONE, FAILED))
        rate = ended / max(1.0, time.time() - began)
        left = (counts[RUNNING] + counts["pending"]) / rate if rate else None
        screen.print(f"  {60 * rate:.3g} clips a minute" + (f", {duration(left)} left" if left else ""))
        for entry in entries:
            if entry.state == RUNNING:
                since = duration(time.time() - entry.updated)
                screen.print(f"  worker {entry.worker}: {entry.name}, {since}", markup=False, soft_wrap=True)
    failed = [entry for entry in entries if entry.state == FAILED]
    for entry in failed[:MAX_LISTED]:
        screen.print(f"  failed: {entry.name}: {entry.error}", markup=False, soft_wrap=True)
    if len(failed) > MAX_LISTED:
        screen.print(f"  and {len(failed) - MAX_LISTED} more")
