"""One video on one denoiser: asks a policy, computes or fills, measures, and writes down what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from ..errors import UnicpError
from ..policies.base import FILLED, Decision, Policy, Step
from ..policies.config import Config, make_policy
from ..tensors.extrapolation import levels_at
from ..tensors.groups import averaged
from .fills.kept import Kept
from .fills.output import OutputFill, leading
from .fills.stack import Stack, StackCall, StackFill
from .fills.units import UnitFill, Units
from .measure import Captured, Measured, Probe, forecast_error
from .meter import Meter
from .report import Generation, SessionReport, StepRecord

LEFT_OUT_NOTE = (
    "the loop left out steps of this run: the call after each gap was computed, and forecasts began anew; give the run "
    "the sigmas of the steps that are taken"
)
GONE = (
    "our hooks on blocks were replaced or removed by others: where they did not act, the model ran in full, and that "
    "is what the report counts; accelerate after the others have put theirs on"
)


@dataclass(kw_only=True)
class Parts:
    """What runs can look into of a denoiser. It outlives them: all that belongs to one video is in the run.

    Attributes:
        stack: its blocks, where they can be passed over.
        probe: what measures in them.
        units: its attention modules and MLPs, where these act on their own.
        book: the plans of a profile (:class:`unicp.policies.budget.PlanBook`).
        meter: what its calls cost; the host tells it of each call.
        shards: processes that share its weights, and have to decide alike.
    """

    stack: Stack | None = None
    probe: Probe | None = None
    units: Units | None = None
    book: Any = None
    meter: Meter = field(default_factory=Meter)
    shards: Any = None

    def rest(self) -> None:
        """No call is in progress any more, however the last one ended."""
        if self.stack is not None:
            self.stack.call = None
        if self.probe is not None:
            self.probe.disarm()
        if self.units is not None:
            self.units.renew()


class Run:
    """One video on one denoiser. Policies, kept values, pending measurements and records live in it and go with it.

    For a loop of your own, on any denoiser; here Euler's method:

    >>> import torch, unicp
    >>> denoiser = lambda latents, sigma: latents * (1 - sigma)
    >>> latents, sigmas = torch.ones(1, 4), [1 - i / 20 for i in range(21)]
    >>> lengths = [b - a for a, b in zip(sigmas, sigmas[1:])]
    >>> run = unicp.Run(unicp.BudgetConfig(target_speedup=2), sigmas, weights=lengths)
    >>> for i, length in enumerate(lengths):
    ...     output = run.step(i, "cond", lambda: denoiser(latents, sigmas[i]))
    ...     latents = latents + length * output
    >>> run.report().computed_steps
    10

    Args:
        config: a config that fills whole outputs and measures nothing in blocks: ``BudgetConfig``,
            ``ScheduleConfig``. Others need the structure of the denoiser, and :func:`unicp.accelerate`.
        sigmas: noise levels of the run (N,), falling; a 0 at the end, where the solver arrives, may follow.
        weights: how much of each output (N,) the solver adds to the latents, if it is of first order: for Euler the
            differences of neighbouring sigmas. With them computed steps make good what forecasts were off by.
        name: what records call the denoiser.
        parts: what can be looked into; a host's.
        generation: where records go that several denoisers share; a host's.
        book: the plans of the config's profile; a host's, which has checked that they are of this denoiser.

    Raises:
        UnicpError: the config looks into blocks and there are none, it has a profile and no host checked that, or the
            sigmas do not fall.
    """

    def __init__(
        self,
        config: Config,
        sigmas: Sequence[float] = (),
        *,
        weights: Sequence[float] | None = None,
        name: str = "denoiser",
        parts: Parts | None = None,
        generation: Generation | None = None,
        book: Any = None,
    ) -> None:
        self.config, self.name = config, name
        self.needs = make_policy(config).needs()
        self.generation = generation or Generation(config.method)
        self._parts = parts or Parts(book=book)
        self._meter = self._parts.meter
        self._policies: dict[str, Policy] = {}
        self._decisions: dict[str, Decision] = {}  # of the step, by what decides apart
        self._fills: dict[str, OutputFill | StackFill] = {}  # by branch
        self._borrowed: dict[str, OutputFill | StackFill] = {}  # those of the denoiser before, until one is computed
        self._units: dict[str, dict[str, UnitFill]] = {}  # by branch and unit
        self._measured: dict[str, dict[int, Captured]] = {}  # by what decides apart, then by block
        self._pending: list[tuple[Policy, Step, StepRecord, Any, dict[str, tuple[int, Any]]]] = []
        self._step: Step | None = None
        self._asked = ""  # the branch that was decided on last
        self._measuring: set[str] = set()  # branches whose calls at this step are to be measured
        self._unmeasured: set[str] = set()  # what decides, and has nothing to compare its next measurement with
        self._remarks: list[str] = []
        self._ran = self._whole = 0  # operations of the calls so far, and what they would have been in full
        self._uncounted: dict[str, int] = {}  # calls so far whose operations are not known, by branch
        self._began = 0.0
        self._branches: list[str] = []  # seen at this step, where the run itself keeps count
        self._last: dict[str, int] = {}  # the step at which each of them was seen last
        self._parts.rest()
        if parts is None:
            self._sigmas, self._weights = self._own(sigmas, weights)

    def _own(
        self, sigmas: Sequence[float], weights: Sequence[float] | None
    ) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
        """Noise levels and weights of a loop of one's own, checked."""
        if self.needs.inside:
            raise UnicpError(
                f"{self.config.method} looks into the blocks of a denoiser, and a Run knows only its outputs; use "
                "unicp.accelerate(transformer, ...), or a BudgetConfig or ScheduleConfig"
            )
        if getattr(self.config, "profile", None) is not None and self._parts.book is None:
            raise UnicpError("a Run takes no profile: use unicp.accelerate, which checks that it is of the same model")
        levels = [float(sigma) for sigma in sigmas]
        levels = levels[:-1] if len(levels) > 1 and levels[-1] == 0 else levels
        falling = all(a >= b for a, b in pairwise((*levels, 0.0)))
        if not levels or not falling or not math.isfinite(levels[0]):
            raise UnicpError(f"sigmas must be the noise levels of all steps, falling, got {list(sigmas)!r:.80}")
        if weights is not None and len(weights) != len(levels):
            raise UnicpError(f"weights must be one a step: {len(levels)} steps, got {len(weights)}")
        if weights is not None and not all(math.isfinite(w) for w in weights):
            raise UnicpError(f"weights must be finite numbers, got {list(weights)!r:.80}")
        return tuple(levels), None if weights is None else tuple([float(w) for w in weights])

    def step(self, index: int, branch: str, compute: Callable[[], Any]) -> Any:
        """The output of the denoiser at a step: the real one, or what stands in for it.

        A branch that was not asked for at the step before is computed, and its forecasts begin anew.

        Args:
            index: denoising step, 0 to N - 1; it never falls.
            branch: guidance branch, ``"cond"`` and ``"uncond"`` where there are two. Each once a step. Only latents and
                noise level may change from step to step of a branch; under another prompt it is another branch.
            compute: runs the denoiser. It is called, or not.

        Raises:
            UnicpError: the step is none of the run's, or one that was over.
        """
        before = self._step
        if not 0 <= index < len(self._sigmas):
            raise UnicpError(f"this run has the steps 0 to {len(self._sigmas) - 1}, got {index!r:.40}")
        if before is not None and (index < before.index or (index == before.index and branch in self._branches)):
            what = "is over" if index < before.index else f"has had its branch {branch!r}"
            raise UnicpError(f"step {index} {what}; a Run is one video: make a new one for the next")
        if before is None or index > before.index:
            self._branches = []
            step = Step(
                index=index,
                count=len(self._sigmas),
                position=0 if before is None else before.position + 1,
                began=index if before is None else before.began,
                sigma=self._sigmas[index],
                sigmas=self._sigmas,
                weights=self._weights,
            )
        else:
            step = before
        if before is not None and index > before.index + 1:
            self.remark(LEFT_OUT_NOTE)
        self._branches.append(branch)
        self._meter.begin(branch, {})
        decision, last = self.decide(step, branch), self._last.get(branch, index)
        self._last[branch] = index
        if last < index - 1:
            self.drop(branch)
            decision = decision if decision.runs else self.instead()
        return self.act(step, branch, decision, lambda: compute())

    def report(self) -> SessionReport:
        """What was done so far."""
        self.settle()
        return self.generation.report(self.notes())

    # -- what hosts use --------------------------------------------------------------------------------------------

    def decide(self, step: Step, branch: str) -> Decision:
        """What this call of the denoiser is to do. Asked before :meth:`act`, once a call.

        All branches of a step may be decided on before the first of them acts.
        """
        self._began = time.perf_counter()
        if self._step is None or step.position != self._step.position:
            if not self.needs.late:
                self.settle()
            self._decisions.clear()
            self._measuring.clear()
            units = self._parts.units
            if units is not None and units.choosing and self._step is not None:
                units.choose(self._meter.cost(branch).units, len(self._units))
        self._step = step
        key, self._asked = self._key(branch), branch
        self._measuring.discard(branch)  # called again at a step, it has been
        if key not in self._decisions:
            self._measuring.add(branch)
            if key not in self._policies:
                self._policies[key] = self._introduced(make_policy(self.config))
            if self._whole and self._parts.units is not None:
                cost = self._meter.cost(branch)
                shares = self._parts.units.shares(cost.units, cost.total)
                self._policies[key].price(shares, self._ran / self._whole)
            self._decisions[key] = self._policies[key].decide(step)
        decision = self._decisions[key]
        fill = self._fills.get(branch)
        ignored = decision.action == "leap" and branch in self._borrowed  # another denoiser's output will do
        if not decision.runs and (fill is None or not fill.kept) and not ignored:
            decision = Decision(action="compute")  # a branch that was never computed has nothing to be filled from
        return decision

    def instead(self) -> Decision:
        """Compute this call, whatever was decided, and decide nothing by it."""
        self._measuring.discard(self._asked)
        return Decision(action="compute")

    def keeps(self, branch: str) -> bool:
        """Whether anything is kept of this branch, or may be kept inside of its calls."""
        return bool(self.needs.units) or (branch in self._fills and bool(self._fills[branch].kept))

    def corrects(self, branch: str) -> bool:
        """Whether the next computed output of this branch is to make good forecasts."""
        fill = self._fills.get(branch)
        return fill is not None and bool(fill.kept.forecasts)

    def drop(self, branch: str) -> None:
        """Nothing that is kept of a branch counts any more, nor what was measured last, if it decides now."""
        self._fills.pop(branch, None)
        self._units.pop(branch, None)
        if branch in self._measuring:
            self._unmeasured.add(self._key(branch))
            self._measured.pop(self._key(branch), None)

    def borrow(self, left: dict[str, OutputFill | StackFill]) -> None:
        """Take what another denoiser's run kept (:meth:`rest`), for steps that the solver has leapt over from there."""
        self._borrowed = left

    def remark(self, note: str) -> None:
        """Say something of this video in its report, once."""
        if note not in self._remarks:
            self._remarks.append(note)

    @property
    def decision(self) -> Decision:
        """What was decided for the step that is under way, for all of its branches."""
        return next(iter(self._decisions.values()))

    def act(
        self,
        step: Step,
        branch: str,
        decision: Decision,
        compute: Callable[[], Any],
        batch: int = 1,
        frames: int = 1,
    ) -> Any:
        """The output of the denoiser, as decided.

        Args:
            step: of the call.
            branch: of the call.
            decision: what :meth:`decide` said.
            compute: runs the denoiser; its blocks and units act by the decision, where they can be looked into.
            batch: samples in the call.
            frames: latent frames of each.
        """
        record = StepRecord(
            index=step.index, sigma=step.sigma, branch=branch, action=decision.action, denoiser=self.name
        )
        if branch not in self._fills:
            self._fills[branch] = StackFill() if self.needs.keep == "stack" else OutputFill(self.needs)
        fill = self._fills[branch]
        if decision.runs:
            self._borrowed.pop(branch, None)
        fill = self._borrowed.get(branch, fill)
        if isinstance(fill, OutputFill) and not decision.runs:
            if decision.action != "leap":
                record.action = "forecast" if fill.kept.used(decision) > 1 else "reuse"
            output = fill.fill(step, decision, self._weight(step, decision))
        else:
            output = self._called(step, branch, decision, fill, compute, batch, frames, record)
        record.operations = self._operations(record)
        # Where the solver leapt from one denoiser to another, calls come before the first one that is counted.
        cost, calls = self._meter.cost(branch).total, self._uncounted.pop(branch, 0) + 1
        if not cost:
            self._uncounted[branch] = calls
        self._ran, self._whole = self._ran + record.operations, self._whole + calls * cost
        self.generation.add(record, calls * cost, self._began)
        self.generation.complete |= step.count is None or step.is_last(1)
        if decision.runs:
            self.generation.hold(self.name, self.tensors())
            if self._parts.units is not None:
                self.generation.sliced(self.name, self._parts.units.slice_tensors())
        if step.is_last(1):  # nothing comes after it: free at once what this branch kept
            self._fills.pop(branch, None)
            self._units.pop(branch, None)
            self._measured.pop(self._key(branch), None)
        return output

    def _called(
        self,
        step: Step,
        branch: str,
        decision: Decision,
        fill: OutputFill | StackFill,
        compute: Callable[[], Any],
        batch: int,
        frames: int,
        record: StepRecord,
    ) -> Any:
        """Runs the denoiser, its blocks and units acting by the decision, and captures what is to be measured."""
        stack, probe, units = self._parts.stack, self._parts.probe, self._parts.units
        measuring = branch in self._measuring and decision.runs and (decision.serves or self.keeps(branch))
        if stack is not None and isinstance(fill, StackFill):
            stack.call = StackCall(step, decision, fill, batch, frames)
        key = self._key(branch)
        if measuring and probe is not None:
            probe.arm(self._measured.get(key, {}), batch, frames)
        if units is not None and decision.runs:
            self._units.setdefault(branch, {})
            units.begin(step, decision, batch, measuring, self._units, branch)
        if decision.place is not None and step.sigmas is not None:
            record.sigma = levels_at([*step.sigmas, 0.0], [decision.place])[0]
        whole = decision.runs and all(action == "compute" for action in decision.units.values())
        output = compute() if self._meter.counted or not whole else self._meter.count(branch, compute)
        if stack is not None and isinstance(fill, StackFill):
            output = self._as_it_ran(stack, output, compute, record)
        changes: dict[str, tuple[int, Any]] = {}
        if units is not None and decision.runs:
            record.units, changes = units.finish()
            record.action = "partial" if record.units else "compute"
        measured = Measured()
        if measuring and probe is not None:
            measured, self._measured[key] = probe.measured()
        elif measuring and self.needs.check and isinstance(fill, OutputFill):
            error = forecast_error(leading(output), fill.leading(), fill.kept.sigmas, step.sigma)
            if error is not None and self._parts.shards is not None:
                error = averaged(error, self._parts.shards)
            measured = Measured(error)
        if decision.runs and isinstance(fill, OutputFill) and self.needs.keep == "output":
            filled = decision.makeshift and any(done in FILLED for done in record.units.values())
            if filled:
                fill.passes(step, output, self._weight(step, decision))
            elif decision.serves or fill.kept.forecasts:
                output = fill.keep(step, output)
            if not decision.serves and not filled:
                self._fills.pop(branch, None)
        if measuring and key not in self._unmeasured:
            self._pending.append((self._policies[key], step, record, measured, changes))
        if measuring:
            self._unmeasured.discard(key)
        return output

    def _as_it_ran(self, stack: Stack, output: Any, compute: Callable[[], Any], record: StepRecord) -> Any:
        """A call's output where acts of ours on blocks are gone: computed in full, and told as that."""
        call, stack.call = stack.call, None
        assert call is not None
        if stack.whole(call):
            return output
        self.remark(GONE)
        call.fill.kept = Kept()
        record.action = "compute"
        # Where some acted and others did not, it is neither the one nor the other.
        return compute() if call.acted and not call.decision.runs else output

    def _key(self, branch: str) -> str:
        """What decides on a branch: that branch for itself, or all together."""
        return branch if self.needs.separate else ""

    def _introduced(self, policy: Policy) -> Policy:
        """A new policy, told what there is to decide on."""
        if self._parts.units is not None:
            self._parts.units.introduce(policy)
        if self._parts.units is None or policy.inner is not None:
            (policy.inner or policy).attach({}, (), self._parts.book)
        return policy

    def _weight(self, step: Step, decision: Decision) -> float | None:
        """The solver's weight of a forecast, if a later step is to make good what it is off by."""
        never = decision.action == "leap" or not self.needs.correct
        return None if never else step.weight

    def _operations(self, record: StepRecord) -> int:
        """Floating-point operations that ran in a call."""
        if record.action in ("compute", "partial"):
            units = self._parts.units
            return self._meter.ran(record.branch, units.ways if units is not None else {})
        cost = self._meter.cost(record.branch)
        return cost.total - cost.stack if self.needs.keep == "stack" else 0

    def settle(self) -> None:
        """Hand what was measured since this was last called to policies and records: one transfer from the device."""
        pending, self._pending = self._pending, []
        together = [
            value.reshape(-1)
            for *_, measured, changes in pending
            for value in (*measured, *[change for _, change in changes.values()])
            if value is not None
        ]
        read = torch.cat([value.to(together[0].device) for value in together]).tolist() if together else []
        values = iter([None if value != value else value for value in read])
        for policy, step, record, measured, changes in pending:
            record.metric, record.motion = [None if value is None else next(values) for value in measured]
            policy.observe(step, record.metric, record.motion)
            units = {n: (age, None if change is None else next(values)) for n, (age, change) in changes.items()}
            policy.observe_units(step, units)

    def tensors(self) -> list[Any]:
        """Every tensor that is held between calls."""
        fills = (*self._fills.values(), *self._borrowed.values())
        held = [tensor for fill in fills for tensor in fill.tensors()]
        held += [t for captured in self._measured.values() for each in captured.values() for t in each]
        return held + [t for units in self._units.values() for fill in units.values() for t in fill.tensors()]

    def rest(self) -> dict[str, OutputFill | StackFill]:
        """Keep nothing any more, as another denoiser has taken over; should this one be called again, it computes.

        Returns:
            The fills of outputs, by branch, as they were.
        """
        self.settle()
        left = dict(self._fills)
        self._free()
        self.generation.hold(self.name, [])
        return left

    def close(self) -> None:
        """The video is over, or broken off: free everything, and leave what there is to say to the generation."""
        try:
            self.settle()
        finally:
            self._free()
            self.generation.said[self.name] = self.notes()
            self.generation.idle[self.name] = self.why_idle()

    def _free(self) -> None:
        self._fills.clear()
        self._borrowed.clear()
        self._units.clear()
        self._measured.clear()
        self._pending.clear()
        self._unmeasured.clear()
        self._parts.rest()

    def notes(self) -> list[str]:
        """What policies and units have to say; one sentence each."""
        said = [note for policy in self._policies.values() for note in policy.notes()] + self._remarks
        said += self._meter.notes
        return said + (self._parts.units.notes if self._parts.units is not None else [])

    def why_idle(self) -> str:
        """Why a run computed every step: as was found that it had to, or in its policy's own words."""
        if self._remarks:
            return self._remarks[0]
        policy = next(reversed(self._policies.values()), None)
        return (policy or make_policy(self.config)).why_idle()
