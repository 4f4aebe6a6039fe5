"""The state of every clip, on disk: pending, running, done, or failed with its error.

One process writes: the driver. A clip is done only when its video and its record are whole on disk; what a killed
batch had finished and not noted is found again.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnicpError
from ..files.whole import digest
from .clips import Clip, Outcome

PRIVATE_FOLDER = ".batch"
"""Folder of the batch's own files, inside the folder of the clips."""
FILE = "manifest.sqlite"
VERSION = 1
PENDING, RUNNING, DONE, FAILED = "pending", "running", "done", "failed"
STATES = (PENDING, RUNNING, DONE, FAILED)

SCHEMA = """
CREATE TABLE IF NOT EXISTS clips (
    key TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    prompt TEXT NOT NULL,
    seed INTEGER NOT NULL,
    spec TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    worker INTEGER,
    seconds REAL,
    fraction REAL,
    bytes INTEGER,
    thumbnail BLOB,
    updated REAL NOT NULL
)
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A clip in the manifest. ``updated`` is in seconds since the epoch; ``seconds`` is how long the clip took."""

    key: str
    name: str
    prompt: str
    seed: int
    state: str
    attempts: int
    error: str | None
    worker: int | None
    seconds: float | None
    fraction: float | None
    bytes: int | None
    updated: float


def record_path(video: Path) -> Path:
    """Path of the JSON file beside a video. Only the last suffix is replaced, as VBench names may contain dots."""
    return video.with_name(video.name[: len(video.name) - len(video.suffix)] + ".json")


def read_whole(video: Path, key: str, *, deep: bool) -> dict[str, Any] | None:
    """The record of a clip whose two files are whole on disk, else ``None``.

    Args:
        key: the clip that the record has to be of.
        deep: compare the video's digest, not only its size.
    """
    try:
        values = json.loads(record_path(video).read_text("utf-8"))
        written = values["video"]
        whole = values["clip"]["key"] == key and video.stat().st_size == written["bytes"]
        if not whole or (deep and digest(video) != written["sha256"]):
            return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return dict(values)


class Manifest:
    """The manifest of a folder.

    Args:
        folder: folder of the clips.
        readonly: whether it is only read; then it has to exist.

    Raises:
        UnicpError: there is none, or it is of a later version of unicp.
    """

    def __init__(self, folder: Path, *, readonly: bool = False) -> None:
        self.folder = folder
        path = folder / PRIVATE_FOLDER / FILE
        if readonly and not path.is_file():
            raise UnicpError(f"there is no batch in {folder}; start one: unicp batch PROMPTS -o {folder}")
        self._base = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._base.row_factory = sqlite3.Row
        if readonly:
            self._base.execute("PRAGMA query_only = ON")
        found = self._base.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            self._base.close()
            raise UnicpError(f"the batch in {folder} was begun by a later unicp (format {found}); update unicp")
        if not readonly:
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")  # a lost last note is found again from the files
            self._base.execute(SCHEMA)
            self._base.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._base.close()

    @contextmanager
    def _together(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._base.execute("ROLLBACK")
            raise
        self._base.execute("COMMIT")

    def plan(self, clips: Sequence[Clip]) -> None:
        """Add clips that are not in the manifest yet.

        Raises:
            UnicpError: a name belongs to another clip.
        """
        known = {row["name"]: row["key"] for row in self._base.execute("SELECT name, key FROM clips")}
        now = time.time()
        with self._together():
            for clip in clips:
                if known.get(clip.name, clip.key) != clip.key:
                    raise UnicpError(
                        f"{self.folder / clip.name} is a clip of another batch, made with other options; "
                        "name another folder, or go on with the same options"
                    )
                known[clip.name] = clip.key
                spec = json.dumps(dict(clip.values), ensure_ascii=False)
                self._base.execute(
                    "INSERT OR IGNORE INTO clips (key, name, prompt, seed, spec, state, updated) "
                    "VALUES (?, ?, ?, ?, ?, 'pending', ?)",
                    (clip.key, clip.name, clip.prompt, clip.seed, spec, now),
                )

    def recover(self, clips: Sequence[Clip], *, resume: bool = True) -> list[Clip]:
        """Compare with what is on disk, and return the clips that are still to be made; failed ones are, too.

        Done clips whose files are gone or torn become pending. Others whose files are whole were finished by a batch
        that was killed before it could note so: they become done. Without ``resume`` all are to be made again; old
        files stay until new ones replace them.
        """
        states = {row["key"]: row["state"] for row in self._base.execute("SELECT key, state FROM clips")}
        todo = []
        with self._together():
            self._base.execute("UPDATE clips SET state = 'pending', worker = NULL WHERE state = 'running'")
            for clip in clips:
                done = states[clip.key] == DONE
                values = read_whole(self.folder / clip.name, clip.key, deep=not done) if resume else None
                if values is None:
                    self._set([clip.key], PENDING, error=None, worker=None)
                    todo.append(clip)
                elif not done:
                    about = values["clip"]
                    self._set(
                        [clip.key],
                        DONE,
                        error=None,
                        seconds=about.get("seconds"),
                        fraction=about.get("computed_fraction"),
                        bytes=values["video"]["bytes"],
                    )
        return todo

    def _set(self, keys: Iterable[str], state: str, **values: Any) -> None:
        values = {"state": state, "updated": time.time(), **values}
        columns = ", ".join(f"{name} = :{name}" for name in values)
        self._base.executemany(f"UPDATE clips SET {columns} WHERE key = :key", [{**values, "key": key} for key in keys])

    def start(self, keys: Sequence[str], worker: int) -> None:
        """Note that a worker makes these clips now."""
        with self._together():
            self._set(keys, RUNNING, worker=worker, error=None)
            self._base.executemany("UPDATE clips SET attempts = attempts + 1 WHERE key = ?", [(key,) for key in keys])

    def release(self, keys: Sequence[str]) -> None:
        """Note that these clips are to be made again, by any worker."""
        with self._together():
            self._set(keys, PENDING, worker=None)

    def finish(self, outcomes: Sequence[Outcome]) -> None:
        """Record the outcomes of clips."""
        with self._together():
            for outcome in outcomes:
                self._set(
                    [outcome.key],
                    DONE if outcome.error is None else FAILED,
                    error=outcome.error,
                    seconds=outcome.seconds,
                    fraction=outcome.fraction,
                    bytes=outcome.bytes,
                    thumbnail=outcome.thumbnail,
                )

    def entries(self) -> list[Entry]:
        """All clips, in the order in which they were first planned."""
        columns = ", ".join(Entry.__dataclass_fields__)
        return [Entry(**dict(row)) for row in self._base.execute(f"SELECT {columns} FROM clips ORDER BY rowid")]

    def thumbnail(self, key: str) -> bytes | None:
        """The JPEG of a clip, if one was made."""
        row = self._base.execute("SELECT thumbnail FROM clips WHERE key = ?", (key,)).fetchone()
        return row["thumbnail"] if row is not None else None

    def counts(self) -> dict[str, int]:
        """How many clips are in each state."""
        rows = self._base.execute("SELECT state, COUNT(*) FROM clips GROUP BY state")
        return {**dict.fromkeys(STATES, 0), **dict(tuple(row) for row in rows)}


def prepare(folder: Path) -> Path:
    """Make the folder of the clips and the batch's own in it, which is returned.

    Raises:
        UnicpError: it cannot be made or written to.
    """
    private = folder / PRIVATE_FOLDER
    try:
        private.mkdir(parents=True, exist_ok=True)
        for place in (private, folder):
            with tempfile.TemporaryFile(dir=place):  # permissions alone would not do: root may write everywhere
                pass
    except OSError as error:
        raise UnicpError(f"cannot write to {folder}: {error.strerror or error}; name another folder with -o") from error
    return private
