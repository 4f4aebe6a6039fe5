"""A lock that lets one batch at a time use a folder; the operating system drops it however its process ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import UnicpError
from ..files.whole import staged

LOCK, OWNER = "lock", "owner.json"


def owner(private: Path) -> dict[str, Any] | None:
    """The process that holds the lock, or held it last: ``pid``, ``host`` and ``since``."""
    try:
        values = json.loads((private / OWNER).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def describe(values: dict[str, Any] | None) -> str:
    """An owner in words."""
    if values is None:
        return "another process"
    return f"process {values.get('pid')} on {values.get('host')}, since {values.get('since')}"


def is_alive(values: dict[str, Any] | None) -> bool | None:
    """Whether an owner's process runs; ``None`` if that cannot be told from this machine."""
    if values is None:
        return False
    if values.get("host") != socket.gethostname() or os.name != "posix":
        return None
    try:
        os.kill(int(values["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


class Lock:
    """The lock of a folder, held while a batch runs. It is SQLite's file lock, which Python has on every system.

    It works across machines if the shared file system supports POSIX locks (NFS does).

    Args:
        private: the folder of the batch's own files.

    Raises:
        UnicpError: on entering, if another batch holds it.
    """

    def __init__(self, private: Path) -> None:
        self._private = private
        self._held: sqlite3.Connection | None = None

    def __enter__(self) -> Lock:
        held = sqlite3.connect(self._private / LOCK, timeout=0, isolation_level=None)
        try:
            held.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            held.close()
            if "locked" not in str(error):
                raise
            raise UnicpError(
                f"another batch works on {self._private.parent}: {describe(owner(self._private))}; "
                f"wait for it, or see: unicp batch status {self._private.parent}"
            ) from None
        self._held = held
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with staged(self._private / OWNER) as part:
            part.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}), "utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            (self._private / OWNER).unlink()
        if self._held is not None:
            self._held.close()
            self._held = None
