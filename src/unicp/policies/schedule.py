"""An explicit plan: compute these steps, fill the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UnicpError
from .base import Decision, Needs, Policy, Step
from .config import Config, check_choice, check_number, check_tuple, register

FILLS = ("reuse", "linear", "quadratic")
UNITS = ("output", "stack")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Compute the named steps or every k-th one, and fill the rest.

    Attributes:
        compute: denoising steps to compute, counted from 0, rising. Give exactly one of ``compute`` and ``interval``.
        interval: compute every ``interval``-th step; 1 computes all.
        warmup_steps: number of first steps that are always computed, at least one.
        fill: ``"reuse"`` repeats the last computed output; ``"linear"`` and ``"quadratic"`` extrapolate the last two
            or three along sigma (ours, not from a paper).
        damping: weight of the extrapolation, 0 to 1, per spacing of the outputs it is made from: at ``r`` such
            spacings beyond the last one it counts ``damping ** (r - 1)`` (squared for ``"quadratic"``), and the rest is
            plain reuse. On a small Wan model, 0.85 cost nothing at gaps of 3 and 4 and rescued gaps of 6.
        unit: ``"output"`` fills the denoiser's whole output, and no part of the denoiser runs at a skipped step;
            ``"stack"`` adds the cached residual of all blocks (then ``fill`` must be ``"reuse"``).

    Raises:
        UnicpError: a value is out of range, or both or neither of ``compute`` and ``interval`` are given.

    >>> ScheduleConfig(interval=2).to_json()  # doctest: +ELLIPSIS
    '{"method": "schedule", "compute": null, "interval": 2, "warmup_steps": 2, "fill": "reuse", ...}'
    """

    method: ClassVar[str] = "schedule"
    schedule_only: ClassVar[bool] = True

    compute: tuple[int, ...] | None = None
    interval: int | None = None
    warmup_steps: int = 2
    fill: str = "reuse"
    damping: float = 0.85
    unit: str = "output"

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """Every second to fifth step computed, the others extrapolated."""
        return {cls.method: {f"interval={k}": cls(interval=k, fill="linear") for k in (2, 3, 4, 5)}}

    def __post_init__(self) -> None:
        if (self.compute is None) == (self.interval is None):
            raise UnicpError("give exactly one of compute=(0, 1, 5, ...) and interval=2 to ScheduleConfig")
        if self.interval is not None:
            check_number("interval", self.interval, low=1, whole=True)
        if self.compute is not None:
            object.__setattr__(self, "compute", check_tuple("compute", self.compute))
            for step in self.compute:
                check_number("a step of compute", step, low=0, whole=True)
            if list(self.compute) != sorted(set(self.compute)) or not self.compute:
                raise UnicpError(f"compute must be rising steps without repetition, got {self.compute!r}")
        check_number("warmup_steps", self.warmup_steps, low=1, whole=True)
        check_number("damping", self.damping, low=0, high=1)
        check_choice("fill", self.fill, FILLS)
        check_choice("unit", self.unit, UNITS)
        if self.unit == "stack" and self.fill != "reuse":
            raise UnicpError(f"unit='stack' can only be filled by 'reuse', got fill={self.fill!r}")


@register(ScheduleConfig)
class SchedulePolicy(Policy):
    """Follows the plan of a :class:`ScheduleConfig`."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.compute = frozenset(config.compute or ())

    def needs(self) -> Needs:
        return Needs(keep=self.config.unit, order=FILLS.index(self.config.fill))

    def decide(self, step: Step) -> Decision:
        config = self.config
        if config.interval is not None:
            wanted = step.index % config.interval == 0
        else:
            wanted = step.index in self.compute
        # The second of two denoisers may start anywhere: its own first steps are its warm-up.
        if wanted or step.position < config.warmup_steps:
            return Decision(action="compute", serves=self._skips_after(step))
        if config.fill == "reuse":
            return Decision(action="reuse")
        return Decision(action="forecast", damping=config.damping)

    def _skips_after(self, step: Step) -> bool:
        """Whether a later step may be skipped."""
        if self.config.interval is not None:
            return self.config.interval > 1
        return step.count is None or not self.compute.issuperset(range(step.index + 1, step.count))

    def why_idle(self) -> str:
        return "its schedule computes every step of this run; give fewer steps in compute=, or interval=2"
