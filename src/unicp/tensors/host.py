"""Small tensors of a device, such as a scheduler's timesteps, on the host: each is fetched once."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_fetched: dict[int, tuple[weakref.ref[Any], int, list[Any]]] = {}  # by id: the tensor, its version, its values


def accelerator() -> Any:
    """The accelerator of this process, ``None`` if there is none."""  # torch 2.6 raises then
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def version_of(tensor: Any) -> int | None:
    """The version counter of a tensor, or ``None``: inference tensors have none."""
    return None if tensor.is_inference() else int(tensor._version)


def place_in(whole: Any, element: Any) -> int | None:
    """Index of the element of ``whole``, a tensor (N,), that another tensor is a view of; ``None`` if it is of none.

    Nothing is read from the device.

    >>> timesteps = torch.tensor([900, 500, 100])
    >>> place_in(timesteps, timesteps[1]), place_in(timesteps, torch.tensor(500))
    (1, None)
    """
    if not isinstance(element, torch.Tensor) or element.numel() != 1:
        return None
    if element.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    place = (element.storage_offset() - whole.storage_offset()) // (whole.stride(0) or 1)
    return int(place) if 0 <= place < len(whole) else None


def listed(tensor: Any) -> list[Any]:
    """``tensor.tolist()``, to be read and not changed. It waits for the device once, until somebody writes to it.

    What is no tensor is not kept.

    >>> listed(torch.tensor([1.0, 0.5]))
    [1.0, 0.5]
    """
    version = version_of(tensor) if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu" else None
    if version is None:
        values: list[Any] = tensor.tolist()
        return values
    key = id(tensor)
    kept = _fetched.get(key)
    if kept is not None and kept[0]() is tensor and kept[1] == version:
        return kept[2]
    _fetched[key] = weakref.ref(tensor, lambda _: _fetched.pop(key, None)), version, tensor.tolist()
    return _fetched[key][2]
