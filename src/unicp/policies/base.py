"""The base of all policies. A policy sees a step, says what to do there, and names what it wants measured.

It handles plain values only.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTIONS = ("compute", "reuse", "forecast", "leap", "partial")
"""What can be decided for a step, in this order: the whole denoiser runs; what was kept stands in; its output is
extrapolated; the solver has gone beyond the step, so the output does not matter; some of its units run."""
UNIT_ACTIONS = ("compute", "reuse", "forecast", "map", "slice")
"""What can happen to a unit in a partial call: it ran in full; its kept output was used; its output was extrapolated
from the last two; it ran on its kept attention map; it ran sliced."""
FILLED = ("reuse", "forecast")
"""Those in which it does not run."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """The step of a generation for which a decision is needed.

    Attributes:
        index: denoising step, 0 for the first.
        count: number of denoising steps, or ``None`` if it is unknown.
        position: how many steps of this generation this denoiser has seen before. It differs from ``index`` for the
            second of two denoisers (Wan 2.2), and where a run begins later.
        began: the run's first step, of any denoiser: above 0 for a video made from another one (``strength``).
        sigma: noise level, falling over the run: sigma of flow matching; on a variance preserving schedule, and where a
            scheduler has no sigmas, the timestep as a share of the training steps.
        sigmas: noise levels of all steps of the run, or ``None`` if they are unknown.
        weights: weight that the pipeline's solver gives to the output of each step (``engine/solver/response.py``);
            ``None`` if no policy asked for it or it is unknown.
        leaps: whether the solver can take longer steps and a policy asked for them.
        free: whether it can also go to noise levels that lie between those of the run.
        starts: whether a short first step before the long ones is worth its cost.
        throughout: whether longer steps are worth it only in plans that take them all the way.
        evenly: whether they are worth it only at even distances.
        noisy: whether the sampler draws noise at its steps.
        switch: the step at which another denoiser takes over (Wan 2.2), or ``None`` if none does or it is unknown.
    """

    index: int
    count: int | None
    position: int
    sigma: float
    began: int = 0
    sigmas: tuple[float, ...] | None = dataclasses.field(default=None, compare=False, repr=False)
    weights: tuple[float, ...] | None = dataclasses.field(default=None, compare=False, repr=False)
    leaps: bool = dataclasses.field(default=False, compare=False)
    free: bool = dataclasses.field(default=False, compare=False)
    starts: bool = dataclasses.field(default=False, compare=False)
    throughout: bool = dataclasses.field(default=False, compare=False)
    evenly: bool = dataclasses.field(default=False, compare=False)
    noisy: bool = dataclasses.field(default=False, compare=False)
    switch: int | None = dataclasses.field(default=None, compare=False)

    @property
    def weight(self) -> float | None:
        """The solver's weight of this step's output, or ``None`` if it is unknown."""
        known = self.weights is not None and self.index < len(self.weights)
        return self.weights[self.index] if known and self.weights else None

    def is_last(self, steps: int) -> bool:
        """Whether this is one of the last ``steps`` steps; ``False`` where the number of steps is unknown."""
        return self.count is not None and self.index >= self.count - steps


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do at a step.

    Attributes:
        action: one of :data:`ACTIONS`.
        until: for a computed step, the place to which the solver goes directly from it, in steps of the run; ``None``
            means the next step. Only where ``Step.leaps`` says that the solver can; the steps between must then be
            decided ``"leap"``. The place may lie between two steps where ``Step.free`` says so; the next step to be
            computed is then the last one before it.
        further: the places to which the solver goes from ``until`` on, in order: solvers look at how many steps are
            left.
        damping: damping of a forecast, per spacing of the outputs it is made from
            (:func:`unicp.tensors.extrapolation.weights`): 1 extrapolates fully, 0 repeats the last value. In a
            ``"partial"`` call it is that of the forecasts of units.
        order: degree of a forecast's extrapolation; ``None`` means the highest that is kept (``Needs.order``).
        place: place on the run's grid where a computed step is evaluated, in steps: its own index if ``None``, else at
            most one step later.
        units: action of each unit by module name, where ``action`` is ``"partial"``: one of :data:`UNIT_ACTIONS`.
        makeshift: whether the output counts as a forecast where units are filled: it is then no value to forecast from,
            and a later computed one corrects it (``Needs.correct``).
        serves: whether later steps may be filled from this computed one. If not, its output is not kept, nor compared
            with others, and what was kept before is freed.
    """

    action: str
    until: float | None = None
    further: tuple[float, ...] = ()
    damping: float = 1.0
    order: int | None = None
    place: float | None = None
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    makeshift: bool = False
    serves: bool = True

    @property
    def runs(self) -> bool:
        """Whether the denoiser is computed, wholly or in part."""
        return self.action in ("compute", "partial")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a policy wants from the engine. All of it is fixed for the life of a policy.

    Attributes:
        keep: value that is kept at a computed step to fill later ones: ``"stack"`` (the block stack's residual),
            ``"output"`` (the denoiser's whole output) or ``"nothing"``.
        order: degree of the extrapolation of a kept output; 0 is plain reuse.
        metric: sub-layer whose residual is compared between computed steps (a key of ``BlockList.residuals``), or
            ``None`` if no residual is compared.
        location: blocks in which it is compared: ``"start"``, ``"mid"``, ``"end"`` or ``"all"``.
        strides: frame distances of the motion score; empty if it is not wanted.
        separate: decide for every guidance branch separately.
        units: kinds of units that act on their own: ``"attention"`` (among video tokens), ``"cross_attention"``,
            ``"mlp"``.
        check: at every computed step, compare the denoiser's output with its linear forecast; :meth:`Policy.observe` is
            then given the forecast's relative error as the change.
        correct: at a computed step, correct for the errors of the forecasts since the last one, as far as the new
            output shows them (:meth:`unicp.engine.fills.kept.Kept.keep`).
        weights: tell the policy the solver's weight of each output (``Step.weights``), where it can be found.
        steadiness: at every computed step, measure how steadily the outputs change, and scale forecasts accordingly
            (:func:`unicp.tensors.extrapolation.steadiness`).
        unit_order: degree of the extrapolation of kept outputs of units; 0 is plain reuse.
        unit_damping: of that extrapolation (``Decision.damping``).
        unit_packed: keep outputs of units in eight bits.
        unit_changes: compare the full output of every unit with what would have stood in for it.
        map_bytes: most bytes of attention maps to keep; 0 keeps none.
        cache_bytes: most bytes of units' outputs to keep, for all guidance branches together; ``None`` means no limit.
        leap: let the solver take longer steps, where it can (``Step.leaps``, ``Decision.until``).
        late: nothing is decided by what is measured, so it is told when the run is over: until then nothing is read
            from the device.
    """

    keep: str
    order: int = 0
    metric: str | None = None
    location: str = "mid"
    strides: tuple[int, ...] = ()
    separate: bool = False
    units: tuple[str, ...] = ()
    check: bool = False
    correct: bool = False
    weights: bool = False
    steadiness: bool = False
    unit_order: int = 0
    unit_damping: float = 1.0
    unit_packed: bool = False
    unit_changes: bool = False
    map_bytes: int = 0
    cache_bytes: int | None = None
    leap: bool = False
    late: bool = False

    def replace(self, **changes: Any) -> Needs:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def inside(self) -> bool:
        """Whether the structure of the denoiser has to be known."""
        return bool(self.metric or self.keep == "stack" or self.units)


class Policy(abc.ABC):
    """Decides, at every denoising step, what is computed. One instance decides for one generation.

    Attributes:
        inner: for a policy that acts inside steps, the policy that decides which whole steps are computed; else
            ``None``.
    """

    inner: Policy | None = None

    @abc.abstractmethod
    def needs(self) -> Needs:
        """Say what the engine has to keep and to measure."""

    @abc.abstractmethod
    def decide(self, step: Step) -> Decision:
        """Return the decision for this step. It is called once per step, in order."""

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:  # noqa: B027
        """Take note of what was measured at a computed step. It is called before the next :meth:`decide`, or at the end
        of the run (``Needs.late``).

        Args:
            step: the step that was computed.
            change: relative change of the metric since the last computed step, or with ``Needs.check`` the relative
                error of the forecast; ``None`` where there was nothing to compare with, or it is not a number.
            motion: motion score; ``None`` if it is not wanted.
        """

    def attach(self, units: Mapping[str, str], protected: Sequence[str], errors: Any) -> None:  # noqa: B027
        """Take note of the denoiser before the first decision; only policies that act on units or follow a book need
        it.

        Args:
            units: kinds of the units that can act, by name.
            protected: names of units that always have to be computed.
            errors: what a profile holds for the policy, or ``None``: errors of units, or a book of plans.
        """

    def price(self, units: Mapping[str, float], spent: float) -> None:  # noqa: B027
        """Take note of what the denoiser costs; told before the decisions of all steps but the first.

        Args:
            units: share of a call's floating-point operations that leaving out each unit saves.
            spent: share of the operations of the steps so far that ran.
        """

    def observe_units(self, step: Step, changes: Mapping[str, tuple[int, float | None]]) -> None:  # noqa: B027
        """Take note of what was measured on units that were computed in full.

        Args:
            step: the step.
            changes: by unit, the age of the output it was compared with, in steps, and the relative change.
        """

    def notes(self) -> list[str]:
        """What a user should know about this generation besides the records; one sentence each."""
        return []

    @abc.abstractmethod
    def why_idle(self) -> str:
        """Why a whole run may have computed every step, and what to do about it; for the warning."""


NO_COUNT_NOTE = (
    "nothing tells how many steps this run has ({so}): accelerate the pipeline itself, or call the denoiser in "
    "cache_context(name, step_index=i, num_inference_steps=n)"
)
"""Note of a policy that needs the number of steps; ``so`` says what follows from not knowing it."""


def no_numbers(count: int) -> str:
    """The note on ``count`` measurements that no decision can rest on."""
    return f"{count} measurements were not finite numbers; what they were to decide was computed"
