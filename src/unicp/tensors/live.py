"""Counts the bytes of tensors that are alive."""

from __future__ import annotations

import weakref
from typing import Any


class LiveBytes:
    """Adds up storages as they appear, and subtracts them again when they are freed.

    Attributes:
        now: bytes of the storages that are alive.
        peak: the most that ``now`` has been.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensor: Any) -> None:
        """Do not count this tensor's storage: it was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def note(self, tensor: Any) -> None:
        """Count this tensor's storage, once."""
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
