"""Windows of UniCP: for how many steps what was computed last stands in (EDCW; the details reconstructed, or ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .base import Step
from .unit_errors import Rows, UnitErrors, error_after, shared_error


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
