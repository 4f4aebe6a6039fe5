"""One sampling run of ComfyUI: what is computed, forecast, or never asked for.

What is forecast is the velocity after guidance, ``v = (x - x0) / sigma``: for models that predict noise it is the
noise, for flow matching the velocity, and for either what k-diffusion's samplers integrate. Everything of a run is in
one object, which lies in the run's own ``transformer_options`` and goes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ...engine.meter import Meter
from ...engine.report import SessionReport
from ...engine.run import Parts, Run
from ...errors import UnicpError
from ...policies.base import Step
from ...policies.budget import BudgetConfig
from ...policies.plans.step_plan import affordable, on_target
from ...tensors.extrapolation import levels_at
from .samplers import ENDS, FORECASTS, LONGER_STEPS, MIN_COMPUTED, SLACK, response, way_of

KEY = "unicp"
"""Of our wrappers on a model, and of a run in its options."""

BRANCH = "guided"
ELSEWHERE = (
    "the sampler evaluated the model elsewhere than at the noise levels of its steps: from there on everything was "
    "computed"
)
UNCHECKED = "that the profile is of this model could not be checked: ComfyUI names weights otherwise than diffusers"
SWITCHED = (
    "conditions switched on or off in the middle of the run: the next step was computed, and forecasts began anew"
)


def in_force(conds: Any, sigma: float) -> tuple[tuple[bool, ...], ...]:
    """Which of a guider's conditions, and of their control nets, act at a noise level; nothing is read from the device.

    Args:
        conds: by branch, lists of conditions, as ComfyUI's guiders hold them.
        sigma: the noise level.
    """
    branches = conds.values() if isinstance(conds, Mapping) else ()
    return tuple([tuple([_acts(a, b, sigma) for c in branch or () for a, b in _ranges(c)]) for branch in branches])


def _ranges(cond: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Noise levels between which a condition acts, and each of its control nets; ``None`` is no bound."""
    yield cond.get("timestep_start"), cond.get("timestep_end")
    control = cond.get("control")
    while control is not None:
        yield getattr(control, "timestep_range", None) or (None, None)
        control = getattr(control, "previous_controlnet", None)


def _acts(start: Any, end: Any, sigma: float) -> bool:
    return (start is None or sigma <= float(start)) and (end is None or sigma >= float(end))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done in one sampling run.

    Attributes:
        sampler: its name.
        way: :data:`~unicp.hosts.comfyui.samplers.FORECASTS`, or ``LONGER_STEPS``.
        steps: that were asked for.
        taken: that the sampler took.
        evaluations: how often the model was asked, and how often it was computed; of every step, guidance included.
        computed: of them.
        session: of forecasts, what was done at each step.
        notes: what could not be done, and why.
    """

    sampler: str
    way: str
    steps: int
    taken: int
    evaluations: int
    computed: int
    session: SessionReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """By evaluations of the model, against the same sampler with all steps."""
        return self.evaluations / self.computed * self.steps / self.taken if self.computed else 1.0

    def __str__(self) -> str:
        done = f"{self.computed} of {self.evaluations} evaluations computed"
        if self.way == LONGER_STEPS:
            done = f"{self.taken} longer steps in place of {self.steps}, {self.computed} evaluations computed"
        lines = [f"unicp, {self.sampler}: {done}, {self.speedup:.2f}x by evaluations"]
        if self.session is not None:
            lines += [f"  {line}" for line in self.session.timeline().values()]
            lines.append("  # computed   ~ forecast   . reused")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


class Sampling:
    """The state of one sampling run.

    Args:
        config: what is asked for.
        sampler: ComfyUI's sampler object.
        sigmas: noise levels of the run (N + 1,), falling; the last one is where it ends.
        book: plans of a profile (:class:`unicp.policies.budget.PlanBook`).

    Attributes:
        sigmas: those that the sampler is to be given.

    Raises:
        UnicpError: the sampler cannot be made faster, or the noise levels rise.
    """

    def __init__(self, config: BudgetConfig, sampler: Any, sigmas: Sequence[float], book: Any = None) -> None:
        self._way = way_of(sampler)
        name = sampler.sampler_function.__name__
        self._sampler, ends = name.removeprefix("sample_"), ENDS.get(name)
        if any(not a >= b for a, b in pairwise((*sigmas, 0.0))):
            raise UnicpError(
                "unicp makes runs faster whose noise levels fall from step to step, and these rise "
                f"({', '.join(f'{s:g}' for s in sigmas)!s:.60}...); bypass the unicp node in this run"
            )
        if book is not None and (self._way != FORECASTS or ends is not None):
            raise UnicpError(
                f"the plans of a profile are for the sampler euler, and {self._sampler} is not played by them; take "
                "euler, or leave the profile out"
            )
        self._steps = len(sigmas) - 1
        self._speed = config.target_speedup or 1.0
        self._notes: list[str] = [] if book is None else [UNCHECKED]
        self._calls = self._computed = 0
        self._lost = False
        self._conditions: Any = None
        self._run: Run | None = None
        self.sigmas = list(sigmas)
        weights = response(sampler, sigmas) if self._way == FORECASTS else None
        if ends is not None:
            speed = max(1.0, self._speed / SLACK)
            config = config.replace(target_speedup=speed, warmup_steps=ends[0], cooldown_steps=ends[1])
        few = ends is not None and affordable(self._steps, config.target_speedup or 1.0) < MIN_COMPUTED
        if weights is None or few:
            self._way, self.sigmas = LONGER_STEPS, self._fewer(sigmas)
            return
        self._levels, self._weights = tuple(sigmas[:-1]), weights
        meter = Meter()
        meter.counted = True  # counting would run under a dispatch mode, which compiled models do not like
        self._run = Run(config, parts=Parts(book=book, meter=meter), name="model")

    def _fewer(self, sigmas: Sequence[float]) -> list[float]:
        """The noise levels of a run of fewer steps."""
        speed, taken = self._speed, affordable(self._steps, self._speed)
        if not on_target(self._steps, taken, speed):
            self._notes.append(
                f"target_speedup={speed:g} cannot be had of {self._steps} steps: {taken} are taken, for "
                f"{self._steps / taken:.3g}x; choose the steps for it"
            )
        if taken >= self._steps:
            return list(sigmas)
        return [*levels_at(sigmas, [self._steps * i / taken for i in range(taken)]), sigmas[-1]]

    def predict(self, compute: Callable[[], Any], x: Any, timestep: Any, conditions: Any = None) -> Any:
        """The clean sample at one evaluation: the real one, or from a forecast velocity.

        Args:
            compute: asks the model, guidance included.
            x: latents (B, ...).
            timestep: noise level of each sample (B,), on any device.
            conditions: which conditions are in force at a noise level; called with it.
        """
        index, self._calls = self._calls, self._calls + 1
        if self._run is None or self._lost:
            return self._real(compute)
        if index >= len(self._levels):
            return self._leave(compute)
        sigma = self._levels[index]
        step = Step(
            index=index,
            count=len(self._levels),
            position=index,
            sigma=sigma,
            sigmas=self._levels,
            weights=self._weights,
        )
        decision = self._run.decide(step, BRANCH)
        # One read of the device where the model runs anyway, and at the second call, before anything was forecast.
        if (decision.runs or index == 1) and not self._at(timestep, sigma):
            return self._leave(compute)
        now = conditions(sigma) if conditions is not None else None
        if index and now != self._conditions:
            self._run.remark(SWITCHED)
            self._run.drop(BRANCH)
            decision = self._run.instead()
        self._conditions = now
        made: list[Any] = []

        def velocity() -> Any:
            made.append(self._real(compute))
            made.append((x - made[0]) / sigma)
            return made[1]

        output = self._run.act(step, BRANCH, decision, velocity)
        return made[0] if made and output is made[1] else x - sigma * output

    def _real(self, compute: Callable[[], Any]) -> Any:
        self._computed += 1
        return compute()

    def _leave(self, compute: Callable[[], Any]) -> Any:
        """Compute this call and all that follow."""
        assert self._run is not None
        self._lost = True
        self._run.remark(ELSEWHERE)
        return self._real(compute)

    @staticmethod
    def _at(timestep: Any, sigma: float) -> bool:
        """Whether an evaluation is at a noise level of the grid; samplers of one stage are never far from it."""
        return abs(float(torch.as_tensor(timestep).reshape(-1)[0]) - sigma) <= 1e-3 * sigma

    def report(self) -> Report:
        """What was done."""
        session = self._run.report() if self._run is not None else None
        return Report(
            sampler=self._sampler,
            way=self._way,
            steps=self._steps,
            taken=len(self.sigmas) - 1,
            evaluations=self._calls,
            computed=self._computed,
            session=session,
            notes=(*self._notes, *(session.notes if session is not None else ())),
        )
