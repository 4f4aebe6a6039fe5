"""Attention modules and MLPs that act on their own: kept, sliced, blended, and how much their outputs change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnicpError
from ...hosts.diffusers import hooks
from ...hosts.diffusers.compiled import eagerly
from ...specs import Unit
from ...tensors.groups import summed
from ..slicing.attention import SlicedAttention
from ..slicing.maps import MapAttention

UNIT_HOOK = "unicp_unit"
Forward = Callable[[], Any]
Full = Callable[[], tuple[Any, Any]]  # output, and attention maps or None
MAP = "/map"
"""Ends the name under which the change of a unit's attention maps is reported."""


def parts(output: Any) -> tuple[Any, ...]:
    """The tensors of a unit's output: joint attention returns one for the video and one for the text."""
    return output if isinstance(output, tuple) else (output,)


def _whole(output: Any, values: list[Any]) -> Any:
    return tuple(values) if isinstance(output, tuple) else values[0]


def output_change(new: Any, old: Any, batch: int) -> Any:
    """The two sums of ``sum|a - b| / sum|b|`` over all tensors of an output, of each sample: (2, B) float32.

    Layouts that fold frames or places into the batch have several rows a sample; they count together.
    """
    difference: Any = 0.0
    size: Any = 0.0
    for a, b in zip(parts(new), parts(old), strict=True):
        a, b = a.reshape(batch, -1).float(), b.reshape(batch, -1).float()
        difference = difference + (a - b).abs().sum(1)
        size = size + b.abs().sum(1)
    return torch.stack([difference, size])


def worst(change: Any) -> Any:
    """The quotient of the two sums, of the worst sample: a float32 scalar tensor."""
    difference, size = change
    return torch.where(difference == 0, torch.where(size.isnan(), size, 0.0), difference / size).max()


@dataclass
class Kept:
    """What is kept of one unit in one guidance branch: the output of the last full computation."""

    output: Any
    index: int  # denoising step of that computation
    maps: Any = None  # the attention maps of the last full computation, where they are kept
    mapped_at: int = 0  # step of that
    sliced: Any = None  # the sliced output of the same call, where differences of sliced outputs are added


@dataclass
class UnitCall:
    """What the units of one denoiser call are to do."""

    branch: str
    index: int
    batch: int
    actions: Mapping[str, str]
    weights: Mapping[str, float]
    measuring: bool
    done: dict[str, str] = field(default_factory=dict)
    changes: dict[str, tuple[int, Any]] = field(default_factory=dict)  # steps since, sums of the change


class Units:
    """Hooks on the units of one denoiser. They act while ``call`` is set, and pass through otherwise.

    Args:
        units: the units to hook.
        slicers: the sliced twins of those that have one, by name.
        mappers: those that keep their attention maps, by name.
        keep_slices: keep the sliced output of an anchor too (``dws="delta"``).
        refresh: a sliced output becomes the kept output as well.
        measure: compare every full output with the one before.
        map_bytes: most bytes of attention maps to keep.
    """

    def __init__(
        self,
        units: list[Unit],
        slicers: Mapping[str, SlicedAttention],
        mappers: Mapping[str, MapAttention],
        *,
        keep_slices: bool = False,
        refresh: bool = False,
        measure: bool = False,
        map_bytes: int = 0,
    ) -> None:
        self.units = units
        self.slicers = slicers
        self.mappers = mappers
        self.call: UnitCall | None = None
        self._keep_slices = keep_slices
        self._refresh = refresh
        self._measure = measure
        self.map_bytes = map_bytes
        self.group: Any = None  # processes over which the tokens are spread
        self.here: Callable[[], bool] = lambda: True  # whether a call is of the thread whose video is accelerated
        self._kept: dict[str, dict[str, Kept]] = {}
        self._placed = [hooks.Placed(u.module, self._act_of(u), UNIT_HOOK, nested=True) for u in units]

    def place(self, how: str) -> None:
        """Begin to act on the units, given how the denoiser is compiled."""
        for placed in self._placed:
            placed.place(how)

    def remove(self) -> None:
        for placed in self._placed:
            placed.remove()
        self.clear()

    def _act_of(self, unit: Unit) -> Callable[..., Any]:
        name = unit.name

        def act(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.call
            if call is None or not self.here():
                return forward(*args, **kwargs)
            if name in call.done:
                raise UnicpError(
                    f"{name} runs twice in one step, so that its output cannot be kept; take it out of units="
                )
            slicer = self.slicers.get(name)
            # With another processor for each module, compiled code would be of no use to the next.
            eager = eagerly(forward, unit.module)
            sliced = (lambda: slicer(eager, args, kwargs)) if slicer is not None and slicer.works else None
            mapper = self.mappers.get(name)
            kept = self._kept.get(call.branch, {}).get(name)
            if mapper is not None and call.actions.get(name) == "map" and kept is not None and kept.maps is not None:
                output, call.done[name] = mapper.reuse(eager, args, kwargs, kept.maps), "map"
                kept.output, kept.index = _ours(output), call.index
                return output

            def full() -> tuple[Any, Any]:
                return mapper.compute(eager, args, kwargs) if mapper is not None else (forward(*args, **kwargs), None)

            output, call.done[name] = self._output(call, name, full, sliced)
            return output

        return act

    def _output(self, call: UnitCall, name: str, full: Full, sliced: Forward | None) -> tuple[Any, str]:
        action = call.actions.get(name, "compute")
        branch = self._kept.setdefault(call.branch, {})
        kept = branch.get(name)
        if action == "reuse" and kept is not None:
            return _ours(kept.output), action
        if sliced is None or action in ("compute", "reuse", "map"):
            return self._compute(call, name, full, sliced, branch), "compute"
        new = sliced()
        if action == "blend" and kept is not None:
            weight = call.weights[name]
            mixed = [torch.lerp(old, fresh, weight) for old, fresh in zip(parts(kept.output), parts(new), strict=True)]
            output = _whole(new, mixed)
        elif action == "delta" and kept is not None and kept.sliced is not None:
            moved = zip(parts(kept.output), parts(new), parts(kept.sliced), strict=True)
            output = _whole(new, [old + (now - then) for old, now, then in moved])
        else:
            action, output = "slice", new
        if self._refresh:
            branch[name] = Kept(_ours(output), call.index, sliced=_ours(new) if self._keep_slices else None)
        return output, action

    def _compute(self, call: UnitCall, name: str, full: Full, sliced: Forward | None, branch: dict[str, Kept]) -> Any:
        output, maps = full()
        kept = branch.get(name)
        # A change of shape inside a generation (per-token masks, another text length) is no anchor to compare with.
        if self._measure and call.measuring:
            same = kept is not None and _alike(kept.output, output)
            call.changes[name] = (
                (call.index - kept.index, output_change(output, kept.output, call.batch))
                if kept is not None and same
                else (0, None)
            )
        if maps is not None and call.measuring:
            old = kept.maps if kept is not None and kept.maps is not None else []
            alike = [m.shape for m in old] == [m.shape for m in maps]
            change = output_change(tuple(maps), tuple(old), call.batch) if alike else None
            call.changes[name + MAP] = (call.index - kept.mapped_at if kept is not None else 0, change)
        reference = sliced() if self._keep_slices and sliced is not None else None
        branch[name] = Kept(
            _ours(output),
            call.index,
            maps=maps,
            mapped_at=call.index,
            sliced=_ours(reference) if reference is not None else None,
        )
        return output

    def changes(self, call: UnitCall) -> dict[str, tuple[int, Any]]:
        """What was measured in a call: steps since, and the relative change since or ``None``. One exchange at most."""
        known = [change for _, change in call.changes.values() if change is not None]
        if known and self.group is not None:
            summed_up = iter(summed(torch.stack(known), self.group))
            return {n: (age, None if c is None else worst(next(summed_up))) for n, (age, c) in call.changes.items()}
        return {n: (age, None if c is None else worst(c)) for n, (age, c) in call.changes.items()}

    def allow(self, size: int) -> bool:
        """Whether attention maps of so many bytes may be kept beside those that are."""
        held = sum(
            m.untyped_storage().nbytes()
            for branch in self._kept.values()
            for k in branch.values()
            for m in k.maps or ()
        )
        return held + size <= self.map_bytes

    def forget(self, branch: str) -> None:
        self._kept.pop(branch, None)

    def clear(self) -> None:
        self.call = None
        self._kept.clear()
        for slicer in self.slicers.values():
            slicer.renew()

    def tensors(self) -> list[Any]:
        """Everything that is kept between calls, without the slicers' own."""
        kept = [k for branch in self._kept.values() for k in branch.values()]
        maps = [m for k in kept for m in k.maps or ()]
        return maps + [t for k in kept for o in (k.output, k.sliced) if o is not None for t in parts(o)]

    def slice_tensors(self) -> list[Any]:
        return [tensor for slicer in self.slicers.values() for tensor in slicer.tensors()]


def _alike(a: Any, b: Any) -> bool:
    return [t.shape for t in parts(a)] == [t.shape for t in parts(b)]


def _ours(output: Any) -> Any:
    """A copy: models may write into the tensors that they were given, and static buffers are filled anew."""
    return _whole(output, [t.detach().clone() for t in parts(output)])
