"""A scheduler's timesteps and noise levels on the host, without a read of the device.

``set_timesteps`` makes them on the host and sends them to the device, where the loop wants them. We want their values,
too, and to fetch them back would wait for all that the device has still to do. So a copy of the scheduler makes them
again, for the CPU.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import weakref
from typing import Any

import torch

from ...tensors.host import Point, note, noted

METHOD = "set_timesteps"

_lock = threading.Lock()
_users: dict[type, tuple[Any, weakref.WeakSet[Any]]] = {}  # by class: what is in its method's place, and for whom


def keep_on_host(scheduler: Any, user: Any) -> None:
    """Have schedulers of this one's class note on the host what their ``set_timesteps`` sends to the device.

    The method is replaced on the class, so that it acts on copies of the scheduler, too, however they are made.

    Args:
        scheduler: any object; one without ``set_timesteps`` is left alone.
        user: as long as it exists, or until it is given to :func:`leave`, the method stays replaced.
    """
    kind = next((each for each in type(scheduler).__mro__ if METHOD in vars(each)), None)
    if kind is None:
        return
    with _lock:
        if kind not in _users:
            _users[kind] = _noting(vars(kind)[METHOD]), weakref.WeakSet()
            setattr(kind, METHOD, _users[kind][0])
        _users[kind][1].add(user)


def leave(user: Any) -> None:
    """Put the classes' own methods back where nobody else needs them replaced.

    Where other code has put something around ours, both stay, and ours goes on to pass calls through.
    """
    with _lock:
        for kind, (placed, users) in list(_users.items()):
            users.discard(user)
            ours = vars(kind).get(METHOD) is placed
            if ours and not users:
                setattr(kind, METHOD, placed.__wrapped__)
                del _users[kind]


def _noting(own: Any) -> Any:
    takes = inspect.signature(own)

    @functools.wraps(own)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        _note_left(self)
        result = own(self, *args, **kwargs)
        made = {name: value for name, value in vars(self).items() if _elsewhere(value)}
        if made and "device" in takes.parameters:
            try:
                twin = copy.deepcopy(self)
                call = takes.bind(twin, *args, **kwargs)
                call.arguments["device"] = "cpu"
                own(*call.args, **call.kwargs)
            except Exception:  # then they are read, as they are needed
                return result
            for name, tensor in made.items():
                again = getattr(twin, name, None)
                if isinstance(again, torch.Tensor) and again.device.type == "cpu" and again.shape == tensor.shape:
                    note(tensor, again.to(tensor.dtype).tolist())
        return result

    return set_timesteps


def _note_left(scheduler: Any) -> None:
    """Note the timesteps that a multistep solver has left in its lists, before those they are parts of are gone."""
    timesteps = getattr(scheduler, "timesteps", None)
    values = noted(timesteps)
    for kept in vars(scheduler).values() if values is not None else ():
        for value in kept if isinstance(kept, list) else ():
            point = Point.of(value) if _elsewhere(value) else None
            place = point.index_in(timesteps) if point is not None and value.ndim == 0 else None
            if place is not None:
                note(value, values[place])


def _elsewhere(value: Any) -> bool:
    """Whether this is a tensor that is not on the host."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"
