"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UnicpError


@contextmanager
def staged(path: Path, what: str = "", parents: bool = True) -> Iterator[Path]:
    """A file beside ``path`` to write into; it becomes ``path`` at the end, and is removed after any exception.

    Args:
        path: path of the finished file.
        what: what is being written, for errors; it ends with a space.
        parents: whether to make missing folders.

    Raises:
        UnicpError: the folder cannot be made or written to.
    """
    part = path.with_name(path.name + ".part")
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise UnicpError(f"cannot write {what}{path}: {error.strerror or error}; name another place") from error
    try:
        yield part
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be made, before the long work whose result it will hold.

    A temporary file is written, and nothing stays behind: permissions alone would not do, as root may write everywhere.

    Raises:
        UnicpError: there is a file where a folder should be, or the system does not let us write there.
    """
    # Not Path.exists, which raises where we may not look.
    nearest = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not nearest.is_dir():
        raise UnicpError(f"cannot write {path}: {nearest} is not a folder")
    if os.path.isdir(path):
        raise UnicpError(f"cannot write {path}: there is a folder of this name; name another place with -o")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UnicpError(f"cannot write {path}: {error.strerror or error}; name another place with -o") from error


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()
