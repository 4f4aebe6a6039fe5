"""Windows of UniCP: for how many steps what was computed last stands in (EDCW; the details reconstructed, or ours).

A speed that is asked for is shared out over the run (:class:`Target`) by the errors of a profile, or by a plan. That
is ours, not a paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .base import Step
from .unit_errors import Rows, UnitErrors, error_after, shared_error

THRESHOLDS = tuple(10 ** (exponent / 24) for exponent in range(-96, 49))
"""What is tried, as a share of the limits: 1e-4 to 100."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a step lies.

    Attributes:
        index: denoising step.
        level: its noise level, or minus its index where nobody tells those of the others.
        levels: those of all steps, falling.
        calibrated: its place among a calibration's steps, as a fractional index.
    """

    index: int
    level: float
    levels: tuple[float, ...] | None = None
    calibrated: float = 0.0

    @classmethod
    def of(cls, step: Step, errors: UnitErrors | None) -> Place:
        """Where a step lies; among those of a profile, if there is one."""
        calibrated = errors.place(step.index, step.count, step.sigma) if errors is not None else 0.0
        level = step.sigma if step.sigmas is not None else -float(step.index)
        return cls(index=step.index, level=level, levels=step.sigmas, calibrated=calibrated)

    def level_after(self, steps: int) -> float:
        """The level so many steps later; 0, where the run is over."""
        if self.levels is None:
            return self.level - steps
        return self.levels[self.index + steps] if self.index + steps < len(self.levels) else 0.0


@dataclass(kw_only=True, eq=False)
class Window:
    """The window of one unit, or of units that share it.

    Attributes:
        members: those units.
        limit: error that a fill may cause, of the first of them; those of others are scaled to it.
        rows: calibrated errors (:class:`UnitErrors`), if there are any.
        forecasts: fills are forecasts from two computed outputs, not the last one.
        anchors: where all of them were computed last, newest first.
        open: profiled: the window that began there has not met an error above the limit.
        length: online: steps from there to the next recompute.
    """

    members: tuple[str, ...]
    limit: float
    rows: Rows | None = None
    forecasts: bool = False
    anchors: list[Place] = field(default_factory=list)
    open: bool = False
    length: int = 1
    due: int = 0

    @property
    def ready(self) -> bool:
        """Whether there is enough to fill from."""
        return len(self.anchors) > self.forecasts

    def renew(self, place: Place) -> None:
        """All members are computed: a window begins."""
        if self.anchors and self.anchors[0].level == place.level:  # a noise level that is visited twice
            del self.anchors[0]
        self.anchors = [place, *self.anchors[:2]]
        self.open = True

    def calibrated(self, now: Place, anchors: Sequence[Place] = ()) -> float:
        """The calibrated error of a fill; infinite where it is not known.

        Args:
            now: where it is filled.
            anchors: from where, newest first; from what is kept if there are none.
        """
        anchors = anchors or self.anchors
        if self.rows is None or len(anchors) <= self.forecasts:
            return float("inf")
        anchor = anchors[0].calibrated
        spacing = anchor - anchors[1].calibrated if self.forecasts else None
        return error_after(self.rows, anchor, now.calibrated, spacing)

    def measured(self, found: Sequence[tuple[float, int, float]], longest: int) -> float:
        """Set the window by what was measured where it began: as long as its expected error stays within the limit.

        It grows by one at most. The error of an old output is expected to grow with the steps; that of a line through
        two outputs as its remainder does, with the product of the distances to both.

        Args:
            found: of each member its own limit, steps since it was computed before, and the error that a fill from
                then would have had.
            longest: most steps to the next recompute.

        Returns:
            The error that is expected of the next step, as a share of the limit.
        """
        error = shared_error(self.limit, ((own, change) for own, _, change in found))
        each = shared_error(self.limit, ((own, change / age) for own, age, change in found))
        here = self.anchors[0]

        def expected(steps: int) -> float:
            return each * steps if not self.forecasts else error * self._remainder(steps)

        length = 1
        if error <= self.limit and (not self.forecasts or len(self.anchors) > 2):
            length = min(self.length + 1, longest)  # a spike, or no number, starts again from one
            while length > 1 and expected(length) > self.limit:
                length -= 1
        self.length, self.due = length, here.index + length
        return (error if self.forecasts else each) / self.limit

    def _remainder(self, steps: int) -> float:
        """How many times the error just measured a forecast has, so many steps later."""
        newest, before, oldest = self.anchors
        later = newest.level_after(steps)
        now = (before.level - newest.level) * (oldest.level - newest.level)
        return (newest.level - later) * (before.level - later) / now


@dataclass(kw_only=True)
class Target:
    """Decides on the recomputes of one shared window, so that the run takes so many times fewer operations.

    With a profile, the threshold that just gives the speed is found anew at every recompute. Without one, what a run
    has measured says nothing about how the errors ahead compare with each other, so the steps come from a plan
    (:func:`~unicp.policies.plans.step_plan.fronted`).

    Attributes:
        speedup: how many times fewer.
        max_window: most steps in a row that are filled.
        cooldown: last steps that are computed.
        saved: share of a step's operations that filling saves.
        spent: what was computed so far, in whole steps.
        plan: the steps to compute, where there is no profile; empty until the first decision.
        reachable: the speed that is possible, if it is less than what was asked for.
    """

    speedup: float
    max_window: int
    cooldown: int
    saved: float = 0.0
    spent: float = 0.0
    plan: tuple[int, ...] = ()
    reachable: float | None = None

    def due(self, window: Window, here: Place, steps: int, first: int, places: Sequence[Place]) -> int:
        """The next step at which the window's units are computed.

        Args:
            window: its newest anchor is the step before ``here``.
            here: the step that is decided on.
            steps: of the run.
            first: the first of this denoiser's steps.
            places: of all steps; needed where errors are calibrated.
        """
        left = (steps - first) / self.speedup - self.spent
        computed = (left - (steps - here.index) * (1 - self.saved)) / self.saved if self.saved else math.inf
        if window.rows is None:
            if not self.plan:
                before = here.index - first  # all computed
                self.plan = self._planned(steps, first, before + max(math.floor(min(computed, steps) + 1e-6), 0))
                self._reach(self.plan, computed, here, steps, first)
            return next((step for step in self.plan if step >= here.index), steps)
        error = self._calibrated(window, places)
        start = window.anchors[0].index
        spacing = start - window.anchors[1].index if len(window.anchors) > 1 else 1
        for threshold in (0.0, *THRESHOLDS, math.inf):
            found = self._played(start, spacing, steps, error, threshold)
            if sum(step >= here.index for step in found) <= computed + 1e-6:
                break
        self._reach(found, computed, here, steps, first)
        return found[0] if found else steps

    def _planned(self, steps: int, first: int, computed: int) -> tuple[int, ...]:
        """The steps to compute, so many of them; more where gaps would be wider than they may be."""
        from .plans.step_plan import fronted

        plan = fronted(steps - first, computed, self.cooldown).compute
        found = []
        for a, b in zip(plan, (*plan[1:], steps - first), strict=True):
            parts = math.ceil((b - a) / (self.max_window + 1))
            found += [first + a + (b - a) * part // parts for part in range(parts)]
        return tuple(found)

    def _reach(self, planned: Sequence[int], computed: float, here: Place, steps: int, first: int) -> None:
        """Note the speed that is possible, where more steps are planned than can be computed at the speed asked for."""
        needed = sum(step >= here.index for step in planned)
        if needed > computed + 1e-6 and self.reachable is None:
            total = self.spent + needed * self.saved + (steps - here.index) * (1 - self.saved)
            self.reachable = (steps - first) / total

    def _played(
        self, start: int, spacing: int, steps: int, error: Callable[[int, int, int], float], threshold: float
    ) -> list[int]:
        """The steps after ``start`` that would be computed."""
        last, found, at = steps - self.cooldown, [], start
        while at < steps:
            length = 1
            while length <= self.max_window and at + length < last and error(at, spacing, length + 1) <= threshold:
                length += 1
            at, spacing = at + length, length
            found.append(at)
        return [step for step in found if step < steps]

    def _calibrated(self, window: Window, places: Sequence[Place]) -> Callable[[int, int, int], float]:
        def error(at: int, spacing: int, length: int) -> float:
            now = min(at + length - 1, len(places) - 1)  # the last step that is filled
            anchors = [places[at], places[max(at - spacing, 0)]]
            return window.calibrated(places[now], anchors) / window.limit

        return error
