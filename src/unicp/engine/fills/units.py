"""Attention modules and MLPs that act on their own: kept, sliced, blended, and how much their outputs change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import UnicpError
from ...policies.base import FILLED, Decision, Policy, Step
from ...policies.unit_errors import UnitErrors
from ...tensors import metrics
from ...tensors.groups import summed
from ...tensors.packed import Packed, unpacked
from ..report import readable_bytes
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
        a, b = a.reshape(batch, -1), b.reshape(batch, -1)
        difference = difference + metrics.distances(a, b)
        size = size + metrics.sizes(b)
    return torch.stack([difference, size])


def worst(change: Any) -> Any:
    """The quotient of the two sums, of the worst sample: a float32 scalar tensor."""
    difference, size = change
    return metrics.quotient(difference, size).max()


class UnitFill:
    """What is kept of one unit in one guidance branch."""

    def __init__(self, order: int = 0, packed: bool = False) -> None:
        self.kept = Kept(order, packed=packed)
        self.index = 0  # denoising step of the newest kept output
        self._whole = False  # the output is a tuple of tensors, not one
        self._shapes: list[tuple[Any, Any, Any]] = []  # of what is not kept: shape, dtype and device of each tensor
        self.maps: list[Any] = []  # the attention maps of the last full computation, where they are kept
        self.mapped_at = 0  # step of that

    def tensors(self) -> list[Any]:
        """Every tensor that is held, the maps first."""
        return [*self.maps, *self.kept.tensors()]

    def keep(self, step: Step, output: Any) -> None:
        """Keep a new output: a copy, as models may write into what they were given, and static buffers are reused."""
        self.kept.keep(step, list(parts(output)), own=False)
        self.index, self._whole = step.index, isinstance(output, tuple)

    def pass_by(self, output: Any) -> None:
        """Keep nothing of an output but how it is shaped."""
        self._shapes = [(t.shape, t.dtype, t.device) for t in parts(output)]
        self._whole = isinstance(output, tuple)

    def blank(self) -> Any:
        """Zeros in the shape of the last output, for where nobody looks at it; ``None`` if there was none."""
        tensors = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in self._shapes]
        tensors = tensors or [torch.zeros_like(unpacked(leaf)) for leaf in next(iter(self.kept.values), [])]
        return (tuple(tensors) if self._whole else tensors[0]) if tensors else None

    def fill(self, step: Step, decision: Decision) -> Any:
        """What stands in for the output at a step: the kept one itself, or a forecast; ``None`` if there is none."""
        if not self.kept:
            return None
        tensors = self.kept.fill(step, decision)
        return tuple(tensors) if self._whole else tensors[0]

    def alike(self, output: Any) -> bool:
        """Whether what is kept has the shapes of an output."""
        return bool(self.kept) and self.kept.shapes() == [t.shape for t in parts(output)]


@dataclass
class UnitCall:
    """What the units of one denoiser call are to do."""

    step: Step
    batch: int
    actions: Mapping[str, str]
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
        modules: the module of each unit, by name.
        kinds: its kind.
        protected: units that are always computed in full.
        eagerly: given what would run a module, and the module: what runs it uncompiled.
        feeds: units whose output goes into one other unit alone, and that unit's name (``BlockList.feeds``).
        unkept: those of them that are never filled but where that other one is, so that nothing is kept of them.
        refresh: a sliced output becomes the kept output as well.
        order: degree of the extrapolation of kept outputs.
        damping: of that extrapolation.
        packed: keep outputs in eight bits.
        measure: compare every full output with what would have stood in for it.
        map_bytes: most bytes of attention maps to keep.
        cache_bytes: most bytes of outputs to keep, over all guidance branches; ``None`` for as many as there are.

    Attributes:
        slicers: the sliced twins of those that have one, by name.
        mappers: those that keep their attention maps, by name.
        errors: what a profile says of the errors of caching and slicing them.
        notes: what cannot be done; one sentence each.
        acts: what is to stand in for the forward of each unit; the host puts it there.
        ways: how each unit ran in the last call.
        way: runs a unit otherwise than in full, and counts it (:meth:`unicp.engine.meter.Meter.way`).
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        kinds: Mapping[str, str],
        protected: Sequence[str],
        eagerly: Callable[[Any, Any], Any],
        *,
        feeds: Mapping[str, str] | None = None,
        unkept: Collection[str] = (),
        refresh: bool = False,
        order: int = 0,
        damping: float = 1.0,
        packed: bool = False,
        measure: bool = False,
        map_bytes: int = 0,
        cache_bytes: int | None = None,
    ) -> None:
        self.slicers: Mapping[str, SlicedAttention] = {}
        self.mappers: Mapping[str, MapAttention] = {}
        self.errors: UnitErrors | None = None
        self.notes: list[str] = []
        self.call: UnitCall | None = None
        self.limit = cache_bytes
        self.chosen: frozenset[str] = frozenset()  # the units whose outputs are kept, where there is a limit
        self.sizes: dict[str, int] = {}  # bytes of an output, while it is open which are kept
        self.ways: dict[str, list[str]] = {}
        self.way: Way = lambda name, how, run: run()
        self.group: Any = None  # processes over which the tokens are spread
        self.map_bytes = map_bytes
        self._kinds, self._protected, self._eagerly = kinds, protected, eagerly
        self._refresh, self._measure, self._packed = refresh, measure, packed
        self._feeds, self._unkept = feeds or {}, frozenset(unkept)
        self._fed = {target: [n for n in self._feeds if self._feeds[n] == target] for target in self._feeds.values()}
        # What has to be filled for a unit that others feed to be: itself, and those of them that are of another kind.
        self._jointly = {to: [to, *(n for n in fed if kinds[n] != kinds[to])] for to, fed in self._fed.items()}
        self.order = order
        self._fill = Decision(action="forecast" if order else "reuse", damping=damping)
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

        self.call = UnitCall(step, batch, decision.units, measuring, fills[branch], held)

    def finish(self) -> tuple[dict[str, str], dict[str, tuple[int, Any]]]:
        """End the call. What each unit did, if not all were computed, and what was measured."""
        call, self.call = self.call, None
        assert call is not None
        self.ways = call.ways
        acted = any(action != "compute" for action in call.done.values())
        return dict(call.done) if acted else {}, self.changes(call)

    @property
    def choosing(self) -> bool:
        """The units whose outputs are kept are yet to be chosen."""
        return self.limit is not None and not self.chosen

    def choose(self, costs: Mapping[str, int], branches: int) -> None:
        """Keep the outputs that save the most operations for their bytes, as many as may be kept.

        Args:
            costs: operations of each unit in a call.
            branches: guidance branches, each of which keeps outputs of its own.

        Raises:
            UnicpError: not one fits.
        """
        assert self.limit is not None
        sizes = {name: size * branches for name, size in self.sizes.items() if size}
        saved = {name: sum(costs.get(n, 0) for n in (name, *self._fed.get(name, ()))) for name in sizes}
        order = sorted(sizes, key=lambda name: saved[name] / sizes[name], reverse=True)
        chosen, left = [], self.limit
        for name in order:
            if sizes[name] <= left and self._feeds.get(name) not in chosen:
                chosen.append(name)
                left -= sizes[name]
        if not chosen:
            least = min(sizes.values(), default=0)
            raise UnicpError(
                f"max_cache_bytes={self.limit}: the smallest output of a unit takes {least} bytes in {branches} "
                "guidance branches; give more, or use a method that keeps whole outputs (BudgetConfig)"
            )
        self.chosen = frozenset(chosen)
        self.notes = [note for note in self.notes if not note.startswith("max_cache_bytes")]
        others = [name for name in sizes if name not in chosen and self._feeds.get(name) not in chosen]
        if others:
            kinds = Counter(self._kinds[name] for name in chosen)
            listed = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in kinds.items())
            used, count = sum(sizes[name] for name in chosen), len(chosen) + len(others)
            self.notes.append(
                f"max_cache_bytes: {len(chosen)} of {count} units are kept ({listed}; {readable_bytes(used)}), "
                "those that save the most operations for their bytes; the others are computed"
            )

    def shares(self, operations: Mapping[str, int], total: int) -> dict[str, float]:
        """The share of a call's operations that each unit takes whose outputs are kept.

        Args:
            operations: of the units in a call that runs in full.
            total: of the whole call.
        """
        kept = self._kinds if self.limit is None else self.chosen
        left_out = [name for name in self._kinds if name in kept or self._feeds.get(name) in kept]
        return {name: operations.get(name, 0) / total for name in left_out} if total else {}

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
            ways = call.ways.setdefault(name, [])
            blank = self._blank(call, name)
            if blank is not None:
                return blank
            # With another processor for each module, compiled code would be of no use to the next.
            eager = self._eagerly(forward, module)

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

    def _filled(self, call: UnitCall, name: str) -> bool:
        """Whether a unit that others feed is filled in this call."""
        fill, actions = call.fills.get(name), [call.actions.get(n, "compute") for n in self._jointly[name]]
        return fill is not None and bool(fill.kept) and all(action in FILLED for action in actions)

    def _blank(self, call: UnitCall, name: str) -> Any:
        """What a unit returns that does not run because the one that it feeds is filled; else ``None``."""
        target, fill = self._feeds.get(name), call.fills.get(name)
        if target is None or fill is None or not self._filled(call, target):
            return None
        blank = fill.blank()
        if blank is not None:
            call.done[name] = self._how(call.fills[target])
        return blank

    def _how(self, fill: UnitFill) -> str:
        """The action by which a unit is filled."""
        return "forecast" if fill.kept.used(self._fill) > 1 else "reuse"

    def _output(self, call: UnitCall, name: str, full: Full, sliced: Forward | None) -> tuple[Any, str]:
        action, fill = call.actions.get(name, "compute"), call.fills.get(name)
        if action in FILLED and name in self._fed and not self._filled(call, name):
            action = "compute"
        if action in FILLED and fill is not None and fill.kept:
            output, how = fill.fill(call.step, self._fill), self._how(fill)
            return output if how == "forecast" else _ours(output), how
        if sliced is None or action != "slice":
            return self._compute(call, name, full), "compute"
        output = sliced()
        if self._refresh and name not in self._unkept and (self.limit is None or name in self.chosen):
            call.fills[name] = fill = UnitFill()
            fill.keep(call.step, output)
        return output, action

    def _compute(self, call: UnitCall, name: str, full: Full) -> Any:
        output, maps = full()
        if name in self._unkept:
            call.fills.setdefault(name, UnitFill()).pass_by(output)
            return output
        if self.limit is not None and name not in self.chosen:
            size = sum(
                Packed.bytes_of(tensor) if self._packed else tensor.numel() * tensor.element_size()
                for tensor in parts(output)
            )
            self.sizes[name] = max(size * (1 + self.order), self.sizes.get(name, 0))
            if name in self._feeds:
                call.fills.setdefault(name, UnitFill()).pass_by(output)
            return output
        fill, step = call.fills.get(name), call.step
        # A change of shape inside a generation (per-token masks, another text length) is no anchor to compare with.
        same = fill is not None and fill.alike(output)
        if self._measure and call.measuring:
            call.changes[name] = (0, None)
            if fill is not None and same:
                change = output_change(output, fill.fill(step, self._fill), call.batch)
                call.changes[name] = (step.index - fill.index, change)
        if maps is not None and call.measuring:
            before = fill.maps if fill is not None else []
            alike = [m.shape for m in before] == [m.shape for m in maps]
            change = output_change(tuple(maps), tuple(before), call.batch) if alike else None
            call.changes[name + MAP] = (step.index - fill.mapped_at if fill is not None else 0, change)
        if fill is None or not same:
            call.fills[name] = fill = UnitFill(self.order, self._packed)
        fill.keep(step, output)
        fill.maps, fill.mapped_at = maps or [], step.index
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
        """Forget which outputs are kept, and let go of sliced weights, which are made again when they are needed."""
        self.call, self.chosen, self.sizes = None, frozenset(), {}
        for slicer in self.slicers.values():
            slicer.renew()

    def slice_tensors(self) -> list[Any]:
        return [tensor for slicer in self.slicers.values() for tensor in slicer.tensors()]


def _ours(output: Any) -> Any:
    return _whole(output, [t.detach().clone() for t in parts(output)])
