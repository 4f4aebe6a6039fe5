"""Attention modules and MLPs that act on their own: kept, sliced, blended, and how much their outputs change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnicpError
from ...policies.base import Decision, Policy, Step
from ...policies.unit_errors import UnitErrors
from ...tensors.groups import summed
from ..slicing.attention import SlicedAttention
from ..slicing.maps import MapAttention
from .kept import Kept

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
    changes: dict[str, tuple[int, Any]] = field(default_factory=dict)  # steps since, sums of the change


class Units:
    """The units of one denoiser. They act while ``call`` is set, and run as they are otherwise.

    Args:
        modules: the module of each unit, by name.
        kinds: its kind.
        protected: units that are always computed in full.
        shares: the share of the denoiser's parameters that is in each.
        eagerly: given what would run a module, and the module: what runs it uncompiled.
        keep_slices: keep the sliced output of an anchor too (``dws="delta"``).
        refresh: a sliced output becomes the kept output as well.
        measure: compare every full output with the one before.
        map_bytes: most bytes of attention maps to keep.

    Attributes:
        slicers: the sliced twins of those that have one, by name.
        mappers: those that keep their attention maps, by name.
        errors: what a profile says of the errors of caching and slicing them.
        notes: what cannot be done; one sentence each.
        acts: what is to stand in for the forward of each unit; the host puts it there.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        kinds: Mapping[str, str],
        protected: Sequence[str],
        shares: Mapping[str, float],
        eagerly: Callable[[Any, Any], Any],
        *,
        keep_slices: bool = False,
        refresh: bool = False,
        measure: bool = False,
        map_bytes: int = 0,
    ) -> None:
        self.slicers: Mapping[str, SlicedAttention] = {}
        self.mappers: Mapping[str, MapAttention] = {}
        self.errors: UnitErrors | None = None
        self.notes: list[str] = []
        self.call: UnitCall | None = None
        self.group: Any = None  # processes over which the tokens are spread
        self.map_bytes = map_bytes
        self._kinds, self._protected, self._shares, self._eagerly = kinds, protected, shares, eagerly
        self._keep_slices, self._refresh, self._measure = keep_slices, refresh, measure
        self.acts = [(module, self._act_of(name, module)) for name, module in modules.items()]

    def introduce(self, policy: Policy) -> None:
        """Tell a new policy what there is to decide on."""
        policy.attach(self._kinds, self._protected, self.errors)

    def spread(self, group: Any) -> None:
        """The tokens are spread over these processes, or over none (``None``).

        Raises:
            UnicpError: attention is sliced or runs on old maps, which is for whole sequences only.
        """
        if group is not None and (self.slicers or self.mappers):
            raise UnicpError(
                "attention of a context-parallel model can be neither sliced nor run on old maps; use pcas=False and "
                "map_level=False"
            )
        self.group = group

    def begin(
        self,
        step: Step,
        decision: Decision,
        batch: int,
        measuring: bool,
        fills: Mapping[str, dict[str, UnitFill]],
        branch: str,
    ) -> None:
        """Begin a call of the denoiser, given what is kept of each guidance branch."""

        def held() -> int:
            maps = [m for units in fills.values() for fill in units.values() for m in fill.maps]
            return sum(m.untyped_storage().nbytes() for m in maps)

        self.call = UnitCall(step, batch, decision.units, decision.weights, measuring, fills[branch], held)

    def finish(self) -> tuple[dict[str, str], dict[str, tuple[int, Any]]]:
        """End the call. What each unit did, if not all were computed, and what was measured."""
        call, self.call = self.call, None
        assert call is not None
        acted = any(action != "compute" for action in call.done.values())
        return dict(call.done) if acted else {}, self.changes(call)

    def fraction(self, done: Mapping[str, str]) -> float:
        """Share of the denoiser's parameters that run: sliced units count whole."""
        return 1.0 - sum(self._shares[name] for name, action in done.items() if action == "reuse")

    def _act_of(self, name: str, module: Any) -> Callable[..., Any]:
        def act(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.call
            if call is None:
                return forward(*args, **kwargs)
            if name in call.done:
                raise UnicpError(
                    f"{name} runs twice in one step, so that its output cannot be kept; take it out of units="
                )
            slicer = self.slicers.get(name)
            # With another processor for each module, compiled code would be of no use to the next.
            eager = self._eagerly(forward, module)
            sliced = (lambda: slicer(eager, args, kwargs)) if slicer is not None and slicer.works else None
            mapper = self.mappers.get(name)
            fill = call.fills.get(name)
            if mapper is not None and call.actions.get(name) == "map" and fill is not None and fill.maps:
                output, call.done[name] = mapper.reuse(eager, args, kwargs, fill.maps), "map"
                fill.keep(call.step, output)
                return output

            def full() -> tuple[Any, Any]:
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
        if self._refresh:
            call.fills[name] = fill = UnitFill()
            fill.keep(call.step, output)
            fill.sliced = _detached(new) if self._keep_slices else None
        return output, action

    def _compute(self, call: UnitCall, name: str, full: Full, sliced: Forward | None) -> Any:
        output, maps = full()
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
        allowed = self.call is not None and self.call.held() + size <= self.map_bytes
        note = f"attention maps are kept up to map_bytes={self.map_bytes}; the others would not fit"
        if not allowed and note not in self.notes:
            self.notes.append(note)
        return allowed

    def renew(self) -> None:
        """Let go of sliced weights; they are made of the denoiser's own again when they are needed."""
        self.call = None
        for slicer in self.slicers.values():
            slicer.renew()

    def slice_tensors(self) -> list[Any]:
        return [tensor for slicer in self.slicers.values() for tensor in slicer.tensors()]


def _alike(a: Any, b: Any) -> bool:
    return [t.shape for t in parts(a)] == [t.shape for t in parts(b)]


def _detached(output: Any) -> Any:
    return _whole(output, [t.detach() for t in parts(output)])
