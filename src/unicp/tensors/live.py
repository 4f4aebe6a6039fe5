"""How many bytes of tensors there are at a time."""

from __future__ import annotations

import weakref
from typing import Any


class LiveBytes:
    """Adds up storages as they come, and takes them off again when they go.

    Attributes:
        now: bytes of those that are there.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensor: Any) -> None:
        """Do not count what this tensor lies in: it was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def note(self, tensor: Any) -> None:
        """Count what this tensor lies in, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
