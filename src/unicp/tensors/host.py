"""Small tensors of a device, such as a scheduler's timesteps, on the host: each is fetched once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

_fetched: dict[int, tuple[weakref.ref[Any], int, list[Any]]] = {}  # by id: the tensor, its version, its values


def accelerator() -> Any:
    """The accelerator of this process, ``None`` if there is none."""
    # torch 2.6 raises where there is none, and takes no ``check_available``.
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def version_of(tensor: Any) -> int | None:
    """The version counter of a tensor, or ``None``: inference tensors have none."""
    return None if tensor.is_inference() else int(tensor._version)


@dataclass(frozen=True)
class Point:
    """Where a timestep lies in the tensor it was taken from: loops pass ``t.expand(batch)`` of ``timesteps[i]``.

    Nothing is read from the device.

    >>> timesteps = torch.tensor([900, 500, 100])
    >>> Point.of(timesteps[1].expand(2)).index_in(timesteps), Point.of(torch.tensor(500))
    (1, None)

    Attributes:
        storage: address of that tensor's storage.
        version: version counter of the tensor, which in-place writes increase; ``None`` in inference mode.
        offset: offset of the timestep, in elements.
        count: number of elements in the storage.
    """

    storage: int
    version: int | None
    offset: int
    count: int

    @classmethod
    def of(cls, timestep: Any) -> Point | None:
        """The place of a timestep; ``None`` if it is a tensor of its own, or has several elements."""
        if not isinstance(timestep, torch.Tensor) or not timestep.numel():
            return None
        if timestep.numel() > 1 and any(n > 1 and s for n, s in zip(timestep.shape, timestep.stride(), strict=True)):
            return None
        try:
            storage = timestep.untyped_storage()
            count, address = storage.nbytes() // timestep.element_size(), storage.data_ptr()
        except (NotImplementedError, RuntimeError):  # a tensor without storage
            return None
        return cls(address, version_of(timestep), int(timestep.storage_offset()), count) if count > 1 else None

    def index_in(self, timesteps: Any) -> int | None:
        """Index of the timestep in a tensor (N,); ``None`` if it was taken from another one."""
        if self.storage != timesteps.untyped_storage().data_ptr():
            return None
        place = self.offset - int(timesteps.storage_offset())
        return place if 0 <= place < len(timesteps) else None


def listed(tensor: Any) -> list[Any]:
    """``tensor.tolist()``, to be read and not changed. It waits for the device once, until somebody writes to it.

    What is no tensor is not kept.

    >>> listed(torch.tensor([1.0, 0.5]))
    [1.0, 0.5]
    """
    values = noted(tensor)
    if values is None:
        values = tensor.tolist()
        note(tensor, values)
    return values


def noted(tensor: Any) -> Any:
    """What :func:`listed` knows of a tensor without reading it; ``None`` if it knows nothing."""
    kept = _fetched.get(id(tensor))
    return kept[2] if kept is not None and kept[0]() is tensor and kept[1] == version_of(tensor) else None


def note(tensor: Any, values: Any) -> None:
    """Know ``tensor.tolist()`` of a device's tensor until somebody writes to it, or until it is gone.

    Of inference tensors nothing is noted, as writing to them leaves no trace.
    """
    there = isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu"
    key, version = id(tensor), version_of(tensor) if there else None
    if version is not None:
        _fetched[key] = weakref.ref(tensor, lambda _: _fetched.pop(key, None)), version, values
