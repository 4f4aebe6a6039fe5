"""Attention modules and MLPs that act on their own: kept, sliced, blended, and how much their outputs change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnicpError
from ...policies.base import Step
from ...specs import Unit
from ...tensors.groups import summed
from ...tensors.metrics import distance_sums
from ..slicing.attention import SlicedAttention
from ..slicing.maps import MapAttention
from .kept import Kept

Forward = Callable[[], Any]
Full = Callable[[], tuple[Any, Any]]  # output, and attention maps or None
Way = Callable[[str, str, Forward], Any]
"""``way(name, how, run)``: runs a unit in this way (:meth:`unicp.engine.meter.Meter.way`)."""
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
        apart, much = distance_sums(a.reshape(batch, -1), b.reshape(batch, -1))
        difference = difference + apart
        size = size + much
    return torch.stack([difference, size])


def worst(change: Any) -> Any:
    """The quotient of the two sums, of the worst sample: a float32 scalar tensor."""
    difference, size = change
    return torch.where(difference == 0, torch.where(size.isnan(), size, 0.0), difference / size).max()


class UnitFill:
    """What is kept of one unit in one guidance branch."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.index = 0  # denoising step of the kept output
        self._whole = False  # the output is a tuple of tensors, not one
        self.maps: list[Any] = []  # the attention maps of the last full computation, where they are kept
        self.mapped_at = 0  # step of that
        self.sliced: Any = None  # the sliced output of the same call, where differences of sliced outputs are added

    def tensors(self) -> list[Any]:
        """Every tensor that is held, the maps first."""
        return [*self.maps, *self.kept.tensors(), *(parts(self.sliced) if self.sliced is not None else ())]

    def keep(self, step: Step, output: Any) -> None:
        """Keep a new output."""
        self.kept.keep(step, [tensor.detach() for tensor in parts(output)])
        self.index, self._whole = step.index, isinstance(output, tuple)

    def fill(self) -> Any:
        """The kept output; ``None`` if there is none."""
        if not self.kept:
            return None
        tensors = self.kept.values[0]
        return tuple(tensors) if self._whole else tensors[0]


@dataclass
class UnitCall:
    """What the units of one denoiser call are to do."""

    step: Step
    batch: int
    actions: Mapping[str, str]
    weights: Mapping[str, float]
    measuring: bool
    fills: dict[str, UnitFill]
    """Of this guidance branch, by unit; those of units that were never computed are missing."""
    held: Callable[[], int]
    """Bytes of the attention maps of all branches."""
    done: dict[str, str] = field(default_factory=dict)
    ways: dict[str, list[str]] = field(default_factory=dict)  # how each unit ran: "full", "slice", "fold", "map"
    changes: dict[str, tuple[int, Any]] = field(default_factory=dict)  # steps since, sums of the change


class Units:
    """The units of one denoiser. They act while ``call`` is set, and run as they are otherwise.

    Args:
        units: the units to hook.
        slicers: the sliced twins of those that have one, by name.
        mappers: those that keep their attention maps, by name.
        keep_slices: keep the sliced output of an anchor too (``dws="delta"``).
        refresh: a sliced output becomes the kept output as well.
        measure: compare every full output with the one before.
        map_bytes: most bytes of attention maps to keep.
        eagerly: given what would run a module, and the module: what runs it uncompiled.

    Attributes:
        acts: what is to stand in for the forward of each unit; the host puts it there.
    """

    def __init__(
        self,
        units: list[Unit],
        slicers: Mapping[str, SlicedAttention],
        mappers: Mapping[str, MapAttention],
        eagerly: Callable[[Any, Any], Any],
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
        self.limited = False  # only what is chosen is kept
        self.chosen: frozenset[str] = frozenset()
        self.sizes: dict[str, int] = {}  # bytes of an output, while it is open which are kept
        self.way: Way = lambda name, how, run: run()  # counts what is run otherwise than in full
        self.group: Any = None  # processes over which the tokens are spread
        self._eagerly = eagerly
        self.acts = [(unit.module, self._act_of(unit)) for unit in units]

    def _act_of(self, unit: Unit) -> Callable[..., Any]:
        name = unit.name

        def act(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.call
            if call is None:
                return forward(*args, **kwargs)
            if name in call.done:
                raise UnicpError(
                    f"{name} runs twice in one step, so that its output cannot be kept; take it out of units="
                )
            slicer = self.slicers.get(name)
            ways = call.ways.setdefault(name, [])
            # With another processor for each module, compiled code would be of no use to the next.
            eager = self._eagerly(forward, unit.module)

            def sliced_run() -> Any:
                assert slicer is not None
                if slicer.stale:
                    ways.append("fold")
                    self.way(name, "fold", slicer.refold)
                ways.append("slice")
                return self.way(name, "slice", lambda: slicer(eager, args, kwargs))

            sliced = sliced_run if slicer is not None and slicer.works else None
            mapper = self.mappers.get(name)
            fill = call.fills.get(name)
            if mapper is not None and call.actions.get(name) == "map" and fill is not None and fill.maps:
                ways.append("map")
                maps = fill.maps
                output = self.way(name, "map", lambda: mapper.reuse(eager, args, kwargs, maps))
                call.done[name] = "map"
                fill.keep(call.step, output)
                return output

            def full() -> tuple[Any, Any]:
                ways.append("full")
                return mapper.compute(eager, args, kwargs) if mapper is not None else (forward(*args, **kwargs), None)

            output, call.done[name] = self._output(call, name, full, sliced)
            return output

        return act

    def _output(self, call: UnitCall, name: str, full: Full, sliced: Forward | None) -> tuple[Any, str]:
        action, fill = call.actions.get(name, "compute"), call.fills.get(name)
        old = fill.fill() if fill is not None else None
        if action == "reuse" and old is not None:
            return old, action
        if sliced is None or action in ("compute", "reuse", "map"):
            return self._compute(call, name, full, sliced), "compute"
        new = sliced()
        if action == "blend" and old is not None:
            weight = call.weights[name]
            mixed = [torch.lerp(kept, fresh, weight) for kept, fresh in zip(parts(old), parts(new), strict=True)]
            output = _whole(new, mixed)
        elif action == "delta" and fill is not None and fill.sliced is not None:
            moved = zip(parts(old), parts(new), parts(fill.sliced), strict=True)
            output = _whole(new, [kept + (now - then) for kept, now, then in moved])
        else:
            action, output = "slice", new
        if self._refresh and (not self.limited or name in self.chosen):
            call.fills[name] = fill = UnitFill()
            fill.keep(call.step, output)
            fill.sliced = _detached(new) if self._keep_slices else None
        return output, action

    def _compute(self, call: UnitCall, name: str, full: Full, sliced: Forward | None) -> Any:
        output, maps = full()
        if self.limited and name not in self.chosen:
            size = sum(tensor.numel() * tensor.element_size() for tensor in parts(output))
            self.sizes[name] = max(size * (1 + self._keep_slices), self.sizes.get(name, 0))
            return output
        fill, step = call.fills.get(name), call.step
        old = fill.fill() if fill is not None else None
        # A change of shape inside a generation (per-token masks, another text length) is no anchor to compare with.
        if self._measure and call.measuring:
            same = fill is not None and _alike(old, output)
            call.changes[name] = (
                (step.index - fill.index, output_change(output, old, call.batch))
                if fill is not None and same
                else (0, None)
            )
        if maps is not None and call.measuring:
            before = fill.maps if fill is not None else []
            alike = [m.shape for m in before] == [m.shape for m in maps]
            change = output_change(tuple(maps), tuple(before), call.batch) if alike else None
            call.changes[name + MAP] = (step.index - fill.mapped_at if fill is not None else 0, change)
        reference = sliced() if self._keep_slices and sliced is not None else None
        call.fills[name] = fill = UnitFill()
        fill.keep(step, output)
        fill.maps, fill.mapped_at = maps or [], step.index
        fill.sliced = _detached(reference) if reference is not None else None
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
        return self.call is not None and self.call.held() + size <= self.map_bytes

    def renew(self) -> None:
        """Forget which outputs are kept, and let go of sliced weights, which are made again when they are needed."""
        self.call, self.chosen, self.sizes = None, frozenset(), {}
        for slicer in self.slicers.values():
            slicer.renew()

    def slice_tensors(self) -> list[Any]:
        return [tensor for slicer in self.slicers.values() for tensor in slicer.tensors()]


def _alike(a: Any, b: Any) -> bool:
    return [t.shape for t in parts(a)] == [t.shape for t in parts(b)]


def _detached(output: Any) -> Any:
    return _whole(output, [t.detach() for t in parts(output)])
