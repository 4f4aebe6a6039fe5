"""Keeps results in one SQLite file, so that an interrupted comparison resumes where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnicpError

VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS format (version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY,
    about TEXT NOT NULL,
    result TEXT NOT NULL,
    made TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE IF NOT EXISTS blobs (
    key TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (key, name)
);
"""


@dataclass(frozen=True)
class Key:
    """The key of a result: everything that changes it."""

    about: Mapping[str, Any]

    @property
    def text(self) -> str:
        return json.dumps(plain(self.about), sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value that JSON can hold: tensors become digests of their values."""
    if hasattr(value, "detach"):
        array = value.detach().float().cpu().contiguous().numpy()
        return f"tensor {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return repr(value)


class Store:
    """Results by :class:`Key`. Each is written whole as soon as it is known.

    Args:
        path: path of the file; ``None`` keeps everything in memory.

    Raises:
        UnicpError: the file cannot be opened, is no result file, or is one of another version.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UnicpError(f"cannot write {self.path}: {error.strerror or error}; name another place") from error
        try:
            self._base = sqlite3.connect(":memory:" if self.path is None else str(self.path))
            self._base.executescript(SCHEMA)
            found = self._base.execute("SELECT version FROM format").fetchone()
            if found is None:
                self._base.execute("INSERT INTO format VALUES (?)", (VERSION,))
                self._base.commit()
        except sqlite3.Error as error:
            raise UnicpError(f"cannot use {self.path} as a file of results: {error}; name another one") from error
        if found is not None and found[0] != VERSION:
            raise UnicpError(
                f"{self.path} holds results of format {found[0]}, this is format {VERSION}; name another file"
            )

    def get(self, key: Key) -> dict[str, Any] | None:
        row = self._base.execute("SELECT result FROM results WHERE key = ?", (key.digest,)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def put(self, key: Key, result: Mapping[str, Any], **blobs: bytes) -> None:
        """Save a result and its files, all of them or none."""
        with self._base:
            values = (key.digest, key.text, json.dumps(plain(result)))
            self._base.execute("INSERT OR REPLACE INTO results (key, about, result) VALUES (?, ?, ?)", values)
            for name, data in blobs.items():
                self._base.execute("INSERT OR REPLACE INTO blobs VALUES (?, ?, ?)", (key.digest, name, data))

    def blob(self, key: Key, name: str) -> bytes | None:
        row = self._base.execute("SELECT data FROM blobs WHERE key = ? AND name = ?", (key.digest, name)).fetchone()
        return None if row is None else bytes(row[0])

    def __len__(self) -> int:
        return int(self._base.execute("SELECT COUNT(*) FROM results").fetchone()[0])

    def close(self) -> None:
        self._base.close()


def pack(**arrays: Any) -> bytes:
    """Arrays, compressed without loss."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: value for name, value in arrays.items() if value is not None})
    return buffer.getvalue()


def unpack(data: bytes) -> dict[str, Any]:
    import numpy as np

    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        return {name: held[name] for name in held.files}


def sixteen_bits(frames: Any) -> Any:
    """Frames in [0, 1] as uint16, which is accurate to 107 dB."""
    import numpy as np

    return (np.clip(frames, 0, 1) * 65535 + 0.5).astype(np.uint16)


def from_sixteen_bits(frames: Any) -> Any:
    import numpy as np

    return frames.astype(np.float32) / 65535
