"""The budget is as fast or as good as asked, with the plan that a profile found best. It is ours, not a paper's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import UnicpError
from .base import NO_COUNT_NOTE, Decision, Needs, Policy, Step, no_numbers
from .config import Config, check_flag, check_number, checked_profile, register

if TYPE_CHECKING:  # it needs numpy, which the command line must not wait for
    from .plans.step_plan import Segment, StepPlan

MAX_DISTILLED_STEPS = 8
"""Steps of a run up to which the report says that there is little to skip; distilled models take 4 to 8."""

COMPARED_SPEEDUPS = (1.4, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Target speed-ups that comparisons try."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(Config):
    """Compute the steps that matter most for a given cost, forecast the others along sigma, and watch the forecasts.

    The plan comes from a profile that ``unicp.tune`` made, or, without one, is a default for models never seen
    (:func:`unicp.policies.plans.step_plan.untuned`): it follows from the noise levels of the run and from what its
    solver can do.

    Attributes:
        profile: a profile with plans (:class:`unicp.Profile`), or the path of one.
        target_speedup: speed-up of the denoising loop over the unaccelerated one; 1 or more, by default 2. Not together
            with ``min_psnr``. Two steps at least are computed. If the number of steps cannot give the target, the
            report's notes say so, and what it gives.
        min_psnr: PSNR in dB against the unaccelerated video. It selects the cheapest plan that reaches this in four of
            five cases, as surely as the prompts of ``tune`` can tell (:attr:`Priced.safe_psnr`). ``accelerate`` refuses
            it without a profile.
        correct: at a computed step, correct for the errors of the forecasts before it, as far as the new output shows
            them, steps are short and outputs change steadily (:func:`unicp.tensors.extrapolation.firmness`,
            :func:`unicp.tensors.extrapolation.steadiness`).
        leap: share of the run, from its beginning, in which the solver takes one long step to the next computed step
            instead of several short ones through forecasts, 0 to 1. After that share it does so only where the long
            step is longer than a twentieth of the run. With 0 it never does. Only multistep solvers (UniPC,
            DPM-Solver++, DEIS) leap; DDIM, and all of them where the pipeline has two denoisers, do only in default
            plans that leap all the way; elsewhere skipped steps are forecast.
        override_reserve: share of the steps that may be computed beyond the plan, 0 to 1, where forecasts turn out
            worse than ``tune`` saw or, at steps that it did not see, twice as bad as any before in this run (of four or
            more). By default a tenth with ``min_psnr``, and none with ``target_speedup``, as every extra step costs
            speed.
        override_zscore: how many standard deviations worse than in ``tune`` a forecast has to be, above 0.
        warmup_steps, cooldown_steps: first and last steps that the default plan always computes, at least 1 and 0. With
            ``None`` the plan chooses.

    Raises:
        UnicpError: a value is out of range, or both targets are given.

    >>> BudgetConfig(target_speedup=2).leap
    0.6
    """

    method: ClassVar[str] = "budget"
    schedule_only: ClassVar[bool] = True

    profile: Any = None
    target_speedup: float | None = None
    min_psnr: float | None = None
    correct: bool = True
    leap: float = 0.6
    override_reserve: float | None = None
    override_zscore: float = 2.0
    warmup_steps: int | None = None
    cooldown_steps: int | None = None

    @property
    def reserve(self) -> float:
        """Share of the steps that may be computed beyond the plan."""
        if self.override_reserve is None:
            return 0.0 if self.min_psnr is None else 0.1
        return self.override_reserve

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """The default plan at several speeds: the budget without a profile."""
        return {cls.method: {f"{speed:g}x": cls(target_speedup=speed) for speed in COMPARED_SPEEDUPS}}

    def shared(self, denoisers: int) -> BudgetConfig:
        return self if denoisers == 1 else self.replace(override_reserve=self.reserve / denoisers)

    def spread(self) -> dict[str, Config]:
        """The plans of one profile at several speeds."""
        speeds = COMPARED_SPEEDUPS if self.profile is not None else ()
        return {f"{speed:g}x": self.replace(target_speedup=speed, min_psnr=None) for speed in speeds}

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", checked_profile(self.profile))
        if self.target_speedup is None and self.min_psnr is None:
            object.__setattr__(self, "target_speedup", 2.0)
        if self.target_speedup is not None and self.min_psnr is not None:
            raise UnicpError("give target_speedup or min_psnr to BudgetConfig, not both")
        if self.target_speedup is not None:
            check_number("target_speedup", self.target_speedup, low=1)
        if self.min_psnr is not None:
            check_number("min_psnr", self.min_psnr, low=0)
        check_flag("correct", self.correct)
        check_number("leap", self.leap, low=0, high=1)
        if self.override_reserve is not None:
            check_number("override_reserve", self.override_reserve, low=0, high=1)
        check_number("override_zscore", self.override_zscore, low=1e-9)
        for name, low in (("warmup_steps", 1), ("cooldown_steps", 0)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=low, whole=True)


MIN_PROMPTS_FOR_BOUND = 8
"""Prompts that it takes to know with 80% confidence what four of five reach (:attr:`Priced.safe_psnr`)."""


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A plan of a profile, with its results in ``tune``.

    Attributes:
        plan: the steps.
        speedup: speed-up of the denoising loop, estimated from the measured share of a step that skipping cannot save.
        psnr: PSNR in dB for every prompt that the plan was tried on; empty if it was not tried.
        expected: forecast error at each computed step on the calibration prompts: (mean, standard deviation).
    """

    plan: StepPlan
    speedup: float
    psnr: tuple[float, ...] = ()
    expected: Mapping[int, tuple[float, float]] | None = None

    @property
    def safe_psnr(self) -> float:
        """PSNR in dB that four of five other prompts reach, with 80% confidence if the plan was tried on 8 or more.

        It is a one-sided tolerance bound: of the prompts that were tried, as few lie below it as would in one of five
        draws if four of five prompts reached it. That is none of 8 to 13, one of 14 to 20, two of 21. Of fewer than 8
        none may lie below it either, but the confidence is lower: 59% for 4.
        """
        ordered, count = sorted(self.psnr), len(self.psnr)
        likely = [math.comb(count, k) * 0.2**k * 0.8 ** (count - k) for k in range(count)]  # that k fail, of a fifth
        below = sum(total <= 0.2 for total in accumulate(likely))
        return ordered[max(below - 1, 0)] if ordered else -math.inf


@dataclass(frozen=True, kw_only=True)
class PlanBook:
    """The plans of a profile, cheapest first, and the noise levels they were made at."""

    sigmas: tuple[float, ...]
    plans: tuple[Priced, ...]

    def choose(self, config: BudgetConfig) -> Priced:
        """The plan for a target: the most expensive one that is fast enough, or the cheapest one that is good enough.

        Speed-ups are estimates, and one step less can cost many dB. So a plan that is 1% short of the target is fast
        enough, and one that is 3% short is, too, if the share of computed steps alone would reach it.

        Raises:
            UnicpError: no plan reaches the target.
        """
        if config.target_speedup is not None:
            wanted = config.target_speedup
            near = [0.97 if 1 / p.plan.cost >= 0.99 * wanted else 0.99 for p in self.plans]
            fast = [p for p, share in zip(self.plans, near, strict=True) if p.speedup >= share * wanted]
            if not fast:
                most = max(p.speedup for p in self.plans)
                raise UnicpError(f"target_speedup={config.target_speedup:g}: the profile's fastest plan has {most:.2f}")
            return max(fast, key=lambda p: p.plan.cost)
        good = [p for p in self.plans if p.psnr and p.safe_psnr >= (config.min_psnr or 0.0)]
        if not any(p.psnr for p in self.plans):
            raise UnicpError(f"min_psnr={config.min_psnr:g}: the profile was tuned without videos; give target_speedup")
        if not good:
            most = max(p.safe_psnr for p in self.plans)
            raise UnicpError(f"min_psnr={config.min_psnr:g}: the profile's best plan reached {most:.1f} dB")
        return min(good, key=lambda p: p.plan.cost)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlanBook:
        """The plans from plain values, as profiles hold them.

        Raises:
            UnicpError: the values are not like those of :meth:`to_dict`.
        """
        try:
            book = cls._from_dict(values)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnicpError(f"the plans of the profile are damaged: {type(error).__name__} {error!s:.80}") from error
        for priced in book.plans:
            plan = priced.plan
            gaps = [(a, b) for a, b in pairwise((*plan.compute, plan.steps)) if b > a + 1]
            inside = bool(plan.compute) and sorted((s.after, s.until) for s in plan.segments) == gaps
            inside &= all(0 <= s.order <= 1 for s in plan.segments)
            inside &= [int(place) for place in plan.places] == list(plan.compute if plan.places else ())
            rising = all(a < b for a, b in zip((-1, *plan.compute), (*plan.compute, plan.steps), strict=True))
            numbers = [priced.speedup, *plan.places, *(s.damping for s in plan.segments)]
            if not (inside and rising and 1 <= plan.steps <= len(book.sigmas) and all(map(math.isfinite, numbers))):
                raise UnicpError("the plans of the profile are damaged: steps outside of the run, or no numbers")
        if not book.plans or not all(map(math.isfinite, book.sigmas)):
            raise UnicpError("the plans of the profile are damaged: no plans, or noise levels that are no numbers")
        return book

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> PlanBook:
        from .plans.step_plan import Segment, StepPlan

        plans = []
        for entry in values["plans"]:
            segments = tuple(
                Segment(after=int(a), until=int(b), order=int(order), damping=float(damping))
                for a, b, order, damping in entry["segments"]
            )
            plan = StepPlan(
                steps=int(entry["steps"]),
                compute=tuple(int(step) for step in entry["compute"]),
                segments=segments,
                places=tuple(float(place) for place in entry.get("places", ())),
                default=bool(entry.get("default", False)),
            )
            expected = {int(step): (float(mean), float(dev)) for step, (mean, dev) in entry["expected"].items()}
            psnr = tuple(float(value) for value in entry["psnr"])
            plans.append(Priced(plan=plan, speedup=float(entry["speedup"]), psnr=psnr, expected=expected))
        return cls(sigmas=tuple(float(s) for s in values["sigmas"]), plans=tuple(plans))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "sigmas": list(self.sigmas),
            "plans": [
                {
                    "steps": priced.plan.steps,
                    "compute": list(priced.plan.compute),
                    "segments": [[s.after, s.until, s.order, s.damping] for s in priced.plan.segments],
                    "places": list(priced.plan.places),
                    "default": priced.plan.default,
                    "speedup": priced.speedup,
                    "psnr": list(priced.psnr),
                    "expected": {str(step): list(pair) for step, pair in (priced.expected or {}).items()},
                }
                for priced in self.plans
            ],
        }


def _of_euler(sigmas: Sequence[float], weights: Sequence[float]) -> bool:
    """Whether these weights of outputs are those of Euler's method on flow matching: the lengths of steps in sigma.

    >>> _of_euler([1.0, 0.6], [-0.4, -0.6]), _of_euler([1.0, 0.6], [-0.2, -0.8]), _of_euler([1.0, 0.6], [])
    (True, False, False)
    """
    lengths = [b - a for a, b in pairwise((*sigmas, 0.0))]
    near = [abs(length - weight) <= 1e-3 * abs(length) for length, weight in zip(lengths, weights, strict=False)]
    return 0 < len(sigmas) <= len(weights) and max(sigmas) <= 1 and all(near)


def is_leap(segment: Segment, steps: int, share: float) -> bool:
    """Whether a solver that can takes one long step over these skipped steps, if ``leap`` is this share.

    Late in a run forecasts over a short gap are better than leaps (measured on the demo model, 30 and 50 steps).
    """
    return segment.until <= share * steps or 20 * (segment.until - segment.after) > steps


@register(BudgetConfig)
class BudgetPolicy(Policy):
    """Follows the plan of a :class:`BudgetConfig`, and spends its reserve where forecasts fail."""

    def __init__(self, config: BudgetConfig) -> None:
        if config.min_psnr is not None and config.profile is None:
            raise UnicpError("min_psnr needs a profile: unicp tune makes one; target_speedup works without")
        self.config = config
        self.book: PlanBook | None = None
        self._plan: StepPlan | None = None
        self._compute: frozenset[int] = frozenset()
        self._expected: Mapping[int, tuple[float, float]] = {}
        self._segments: dict[int, Segment] = {}  # by skipped step, the segment that it belongs to
        self._places: dict[int, float] = {}  # by computed step, the place where it is evaluated, if not its own
        self._last_filled = -1  # the last step of which any branch is filled
        self._largest, self._measured = 0.0, 0  # forecast errors of this run
        self._extra = 0
        self._reserve = 0
        self._blind = False
        self._broken = 0
        self._levels: set[float | None] = set()  # noise levels whose outputs were measured
        self._unanswered = 0  # alarms at which no reserve was left
        self._remarks: list[str] = []
        self._computed: list[int] = []
        self._leaping = False  # the plan was made for a solver that takes longer steps
        self._throughout = False  # longer steps only in plans that take them all the way
        self._beyond = 0  # the solver leaps over all steps before this one
        self._until: float | None = None  # the place to which it goes, at that step or less than one step later

    def needs(self) -> Needs:
        config = self.config
        return Needs(
            keep="output",
            order=1,
            check=True,
            weights=True,
            correct=config.correct,
            steadiness=True,
            leap=config.leap > 0,
            late=config.reserve == 0,
        )

    def attach(self, units: Mapping[str, str], protected: Sequence[str], errors: Any) -> None:
        self.book = errors

    def _begin(self, step: Step) -> None:
        from .plans.step_plan import StepPlan, beginning, resampled

        config, count = self.config, step.count
        if count is None:
            self._remarks.append(NO_COUNT_NOTE.format(so="no plan can be made, and all were computed"))
            self._follow(StepPlan(steps=step.index + 1, compute=()))
            return
        self._throughout, self._leaping = step.throughout or step.switch is not None, step.leaps
        self._remarks, self._beyond, self._until = [], 0, None
        if self.book is not None:
            priced = self.book.choose(config)
            plan, old, new = priced.plan, self.book.sigmas[: priced.plan.steps], step.sigmas
            if new is None:  # the noise levels are unknown: carry the plan over by the share of the run
                old, new = (tuple(1 - i / n for i in range(n)) for n in (plan.steps, count))
            plan = resampled(plan, old, new)
            if priced.plan.default and (plan is not priced.plan or step.began):
                share = len(priced.plan.compute) / priced.plan.steps
                plan = self.default_plan(step, max(1, round(share * (count - step.began))))
            same = plan is priced.plan
            self._expected = (priced.expected or {}) if same else {}
            if not same:
                self._remarks.append(
                    f"the profile is of {priced.plan.steps} steps at other noise levels than these {plan.steps}; its "
                    "plan was carried over"
                )
        else:
            self._remarks.append(
                "no profile: the default plan of the budget; to ask for a quality (min_psnr), make a profile with "
                "unicp tune"
            )
            plan = self._untuned(step)
        judged = len(priced.psnr) if self.book is not None else 0
        if config.min_psnr is not None and judged < MIN_PROMPTS_FOR_BOUND:
            self._remarks.append(
                f"prompts that judged this plan: {judged}, which promises little for others; tune(min_psnr=...) with "
                f"{2 * MIN_PROMPTS_FOR_BOUND} prompts promises more"
            )
        if config.correct and step.weights is None:
            self._remarks.append(
                "forecasts were not corrected: what the scheduler makes of an output cannot be told (it may draw noise)"
            )
        self._reserve = round(config.reserve * plan.steps)
        if plan.places and step.switch is not None:  # the solver leaps all the way, from one denoiser to the other
            self._follow(plan)
            self._beyond = next((s for s in plan.compute if s >= step.index), plan.steps)
        elif step.index > step.began:
            begun = beginning(plan, step.index)
            if len(begun.compute) > len(plan.compute):
                self._remarks.append(
                    f"this denoiser has nothing to forecast from when it begins: {len(begun.compute)} of {plan.steps} "
                    f"steps are computed, not {len(plan.compute)}, for {1 / begun.cost:.3g}x by the steps"
                )
            self._follow(begun)
        else:
            self._follow(plan)

    def _untuned(self, step: Step) -> StepPlan:
        """The default plan for the speed that is asked for."""
        from .plans.step_plan import affordable, on_target

        assert step.count is not None
        steps, speedup = step.count - step.began, self.config.target_speedup or 1.0
        asked = affordable(steps, speedup)
        plan = self.default_plan(step, asked)
        computed = len(plan.compute)
        if not on_target(steps, computed, speedup):
            forced = self._ends() if computed > asked else ""
            self._remarks.append(
                f"target_speedup={speedup:g} cannot be had of {steps} steps{f' with {forced}' if forced else ''}: "
                f"{computed} are computed, for {steps / computed:.3g}x by the steps; "
                + (f"leave out {forced}" if forced else "choose num_inference_steps for it")
            )
        if 1 < steps <= MAX_DISTILLED_STEPS and computed < steps:
            self._remarks.append(
                f"a run of {steps} steps leaves little to skip, least of all with a model distilled for so few: try "
                "fewer num_inference_steps first"
            )
        return plan

    def _ends(self) -> str:
        """The first and last steps that the config asks for, in words; empty if it leaves them to the plan."""
        names = ("warmup_steps", "cooldown_steps")
        given = [f"{name}={value}" for name in names if (value := getattr(self.config, name)) is not None]
        return " and ".join(given)

    def default_plan(self, step: Step, computed: int) -> StepPlan:
        """The default plan, for the steps of the run that are left where it begins later (``strength``).

        Args:
            step: of the run; it says what its solver can do.
            computed: how many of the steps to compute.
        """
        from .plans.step_plan import later, untuned

        assert step.count is not None
        config, steps = self.config, step.count - step.began
        sigmas = (step.sigmas or ())[step.began :]
        if len(sigmas) != steps:
            sigmas = tuple([1 - i / steps for i in range(steps)])
        plan = untuned(
            sigmas,
            computed,
            leaps=step.leaps and config.leap > 0,
            free=step.free,
            starts=step.starts,
            throughout=step.throughout,
            evenly=step.evenly,
            corrects=config.correct and step.weights is not None,
            stays=step.weights is not None and step.weights[-1] == 0,
            switches=step.switch is not None,
            draws=step.noisy,
            cut=step.weights is not None and len(step.weights) > step.count,
            euler=_of_euler(sigmas, (step.weights or ())[step.began :]),
            warmup=config.warmup_steps,
            cooldown=config.cooldown_steps,
        )
        return later(plan, step.began)

    def _follow(self, plan: StepPlan) -> None:
        self._plan = plan
        self._compute = frozenset(plan.compute)
        self._segments = {s: segment for segment in plan.segments for s in range(segment.after + 1, segment.until)}
        self._places = dict(zip(plan.compute, plan.places, strict=True)) if plan.places else {}
        self._last_filled = max(self._segments, default=-1)

    def decide(self, step: Step) -> Decision:
        if self._plan is None or (self._leaping and not step.leaps):  # that turns out after the first step
            self._begin(step)
        if step.index < self._beyond:
            return Decision(action="leap")
        segment = self._segments.get(step.index)
        if segment is None or not self._computed or step.index in self._compute:
            return self._now(step)
        if self._blind:  # a measurement that is not a number is never a reason to forecast, whatever the reserve
            return self._now(step)
        order = min(segment.order, len(self._computed) - 1)
        return Decision(action="forecast", order=order, damping=segment.damping) if order else Decision(action="reuse")

    def _now(self, step: Step) -> Decision:
        """Compute this step."""
        blind, self._blind = self._blind, False
        self._computed.append(step.index)
        # The place that the solver has come to, which may lie beyond this step's own noise level.
        place = self._until if self._until is not None and int(self._until) == step.index and self._until % 1 else None
        route = self._route(step) if step.leaps and not blind else None
        self._until, further = (None, ()) if route is None else (route[0], route[1:])
        serves = step.index < self._last_filled
        return Decision(action="compute", until=self._until, further=further, place=place, serves=serves)

    def _route(self, step: Step) -> tuple[float, ...] | None:
        """The places to which the solver goes from a computed step, or ``None`` if it goes to the next step.

        If no step is computed after it, the place is the end of the run. The steps between are leapt over.
        """
        plan = self._plan
        assert plan is not None
        if plan.places:  # leaps all the way, even where the next place is beyond the next step and skips none
            self._beyond = next((s for s in plan.compute if s > step.index), plan.steps)
            return tuple([p for s, p in self._places.items() if s > step.index]) or (float(plan.steps),)
        segment = self._segments.get(step.index + 1)
        if segment is None or not self._long(segment, plan):
            return None
        self._beyond = segment.until
        return tuple(map(float, self._following(segment.until, plan))) or (float(plan.steps),)

    def _override(self, after: int) -> None:
        """Halve the gap after a computed step, if there is some reserve left.

        A gap that the solver has leapt over cannot be changed any more, so the one after it is halved instead. Without
        a reserve the run is over by now, and failures are only counted.
        """
        from .plans.step_plan import halved

        assert self._plan is not None
        changed = halved(self._plan, max(after, self._beyond) if self.config.reserve else after)
        if changed is self._plan:
            return
        if self._extra < self._reserve:
            self._extra += 1
            self._follow(changed)
        else:
            self._unanswered += 1

    def _long(self, segment: Segment, plan: StepPlan) -> bool:
        """Whether the solver takes one long step over these skipped steps."""
        return not self._throughout and is_leap(segment, plan.steps, self.config.leap)

    def _following(self, step: int, plan: StepPlan) -> Iterator[int]:
        """The steps that the solver takes from this one on; solvers look at how many are left."""
        while step < plan.steps:
            yield step
            segment = self._segments.get(step + 1)
            step = segment.until if segment is not None and self._long(segment, plan) else step + 1

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:
        again = step.sigma is not None and step.sigma in self._levels
        self._levels.add(step.sigma)
        if change is None or not math.isfinite(change):
            # There is nothing to forecast from at first, and where a noise level is visited again (Heun's method).
            broken = step.index != self._computed[0] and not again
            self._broken += broken
            self._blind = broken and self.config.reserve > 0  # without a reserve this is told when the run is over
            return
        expected = self._expected.get(step.index)
        if expected is not None:
            mean, deviation = expected
            limit = mean + self.config.override_zscore * max(deviation, 0.1 * mean)
        else:  # tuning did not measure this step; errors differ by as much as the gaps before them
            limit = 2 * self._largest if self._measured >= 4 else math.inf
        if change > limit:
            self._override(step.index)
        self._largest, self._measured = max(self._largest, change), self._measured + 1

    def notes(self) -> list[str]:
        said = list(self._remarks)
        if self._extra:
            said.append(f"{self._extra} of {self._reserve} steps of the reserve were spent where forecasts failed")
        if self._unanswered:
            said.append(
                f"forecasts failed at {self._unanswered} steps with no reserve left; override_reserve gives more"
            )
        if self._broken and not self.config.reserve:
            return [*said, f"{self._broken} outputs of the denoiser, or their distances, were not finite numbers"]
        return said + ([no_numbers(self._broken)] if self._broken else [])

    def why_idle(self) -> str:
        if self._plan is not None and not self._compute:
            return self._remarks[-1]
        remedies = ["ask for a lower min_psnr"] if self.config.min_psnr is not None else []
        if self.config.target_speedup == 1:
            remedies = ["ask for a target_speedup above 1"]
        forced = (self.config.warmup_steps or 0) + (self.config.cooldown_steps or 0)
        if self._plan is not None and forced >= self._plan.steps:
            remedies.append(f"leave out {self._ends()}")
        return f"its plan computes every step of this run; {', or '.join([*remedies, 'give more steps'])}"
