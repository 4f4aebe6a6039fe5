"""What the calls of one denoiser cost, in floating-point operations: counted once for each shape, then known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..policies.base import FILLED
from ..specs import ATTENTION_KINDS, ModelSpec
from ..tensors.flops import Counter, scoped
from .arguments import leaves

STACK = "stack"
Key = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Operations of one call of the denoiser in full.

    Attributes:
        total: of the whole call.
        stack: of the blocks that are passed over together.
        units: of each unit, by name; a unit that does not run in this guidance branch has 0.
    """

    total: int = 0
    stack: int = 0
    units: Mapping[str, int] = field(default_factory=dict)

    def by_kind(self, kinds: Mapping[str, str]) -> dict[str, int]:
        """Operations by kind of unit, and ``"rest"``.

        Args:
            kinds: kind of every unit by name.
        """
        found: dict[str, int] = {}
        for name, count in self.units.items():
            found[kinds[name]] = found.get(kinds[name], 0) + count
        return {**found, "rest": self.total - sum(found.values())}


class Meter:
    """Counts the first call of each guidance branch and shape in full, and knows the others by it.

    Counting goes on while the call runs, on the host, by shapes alone: it changes no bit, reads nothing from the
    device, and from the second call on there is nothing of it.

    Args:
        denoiser: the transformer.
        spec: its structure; without one only whole calls are counted.

    Attributes:
        counted: the cost of the call that was begun is known.
        around: makes a context for calls that are counted; a host's, where what it calls may be compiled.
    """

    def __init__(self, denoiser: Any = None, spec: ModelSpec | None = None) -> None:
        self._units = spec.units(denoiser) if spec is not None else []
        self._stack = [block for _, block, _ in spec.stack(denoiser)] if spec is not None else []
        self._costs: dict[Key, Cost] = {}
        self._latest: dict[str, Cost] = {}  # by branch
        self._ways: dict[Key, int] = {}
        self._key: Key = ()
        self._counter: Counter | None = None  # of a call that is counted now
        self.counted = False
        self.around: Callable[[], Any] = contextlib.nullcontext
        self.kinds = {unit.name: unit.kind for unit in self._units}
        self.uncounted: set[str] = set()

    def begin(self, branch: str, call: Mapping[str, Any]) -> None:
        """A call begins, with these arguments; what the meter is asked next is of it."""
        given = [leaf for value in call.values() for leaf in leaves(value)]
        self._key = (branch, *[leaf.shape for leaf in given if isinstance(leaf, torch.Tensor)])
        self.counted = self._key in self._costs

    @property
    def counting(self) -> bool:
        """A call is being counted: it has to run as the modules are written, not as compiled."""
        return self._counter is not None

    def cost(self, branch: str) -> Cost:
        """What the call of this branch costs in full. One that only ever ran in part, or that is not the call which was
        begun, costs as much as the last of its branch did.
        """
        known = self._costs.get(self._key) if self._key[:1] == (branch,) else None
        return known or self._latest.get(branch) or next(iter(self._latest.values()), Cost())

    def count(self, branch: str, run: Callable[[], Any]) -> Any:
        """Run a call in full, for the first time, and note what it costs."""
        counter = self._counter = Counter()
        modules = [(unit.name, unit.module) for unit in self._units] + [(STACK, block) for block in self._stack]
        try:
            with self.around(), scoped(counter, modules), counter:
                output = run()
        finally:
            self._counter = None
        units = {name: counter.scopes.get(name, 0) for name in self.kinds}
        self._costs[self._key] = self._latest[branch] = Cost(
            total=counter.total, stack=counter.scopes.get(STACK, 0), units=units
        )
        attention = [name for name, kind in self.kinds.items() if kind in ATTENTION_KINDS and units[name]]
        self.uncounted.update(type(u.module).__name__ for u in self._units if u.name in attention and
                              u.name not in counter.attended)  # fmt: skip
        return output

    def way(self, name: str, how: str, run: Callable[[], Any]) -> Any:
        """Run a unit in another way than in full (sliced, on an old map), counting the first time."""
        key = (self._key, name, how)
        with self._counter.paused() if self._counter is not None else contextlib.nullcontext():
            if key in self._ways:
                return run()
            with Counter() as counter:
                output = run()
        self._ways[key] = counter.total
        return output

    def ran(self, branch: str, ways: Mapping[str, Sequence[str]]) -> int:
        """Operations of a call whose units ran as these say: ``"full"``, or as :meth:`way` was told; or not at all.

        Args:
            ways: by unit that was called.
        """
        cost = self.cost(branch)
        total = cost.total
        for name, hows in ways.items():
            own = cost.units.get(name, 0)
            total += sum(own if how == "full" else self._ways.get((self._key, name, how), own) for how in hows) - own
        return total

    def by_kind(self, branch: str, done: Mapping[str, str]) -> dict[str, int]:
        """Operations of a call by kind of unit, and ``"rest"``.

        Args:
            done: action of each unit, as a record has them (``StepRecord.units``).
        """
        cost = self.cost(branch)
        found = cost.by_kind(self.kinds)
        for name, action in done.items():
            own = cost.units.get(name, 0)
            if action != "compute":
                ran = 0 if action in FILLED else self._ways.get((self._key, name, action), own)
                found[self.kinds[name]] += ran - own
        return found

    @property
    def notes(self) -> list[str]:
        """What could not be counted."""
        if not self.uncounted:
            return []
        listed = ", ".join(sorted(self.uncounted))
        return [f"operations of attention were not counted where its kernel is unknown ({listed}): shares are too high"]
