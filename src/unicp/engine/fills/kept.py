"""Values kept along sigma, and the fills made from them: one piece of code for outputs, stacks and units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...policies.base import Decision, Step
from ...tensors import extrapolation
from ...tensors.packed import Packed, unpacked


class Kept:
    """Values of one thing at the last computed steps, in one guidance branch.

    A value is a list of leaves: tensors, and what is none. Each fill says what its value is.

    Args:
        order: degree of the extrapolation, from 0; ``order + 1`` values are kept.
        steadiness: measure how steadily values change, and scale forecasts accordingly.
        packed: keep values in eight bits (:class:`~unicp.tensors.packed.Packed`).

    Attributes:
        values: newest first.
        sigmas: their noise levels.
        steady: how steadily each leaf changes; ``None`` where it was not measured yet.
        forecasts: the fills since the last computed step, as (sigma, the solver's weight of that step, factors of the
            kept values, newest first; none where the value was computed from what was filled inside).
        passed: sum of such values, each times its weight.
    """

    def __init__(self, order: int = 0, steadiness: bool = False, packed: bool = False) -> None:
        self.order, self._measures, self._packed = order, steadiness, packed
        self.values: list[list[Any]] = []
        self.sigmas: list[float] = []
        self.steady: list[Any] | None = None
        self.forecasts: list[tuple[float, float, list[float]]] = []
        self.passed: list[Any] = []

    def __bool__(self) -> bool:
        """Whether there is something to fill from."""
        return bool(self.values)

    def tensors(self) -> list[Any]:
        """Every tensor that is held."""
        leaves = [leaf for value in (*self.values, self.passed) for leaf in value]
        parts = [part for leaf in leaves for part in (leaf.tensors if isinstance(leaf, Packed) else (leaf,))]
        return [part for part in parts if isinstance(part, torch.Tensor)]

    def shapes(self) -> list[Any]:
        """The shape of every tensor of the newest value."""
        return [leaf.shape for leaf in next(iter(self.values), []) if hasattr(leaf, "shape")]

    def _known(self, count: int) -> list[list[Any]]:
        """The newest values, newest first, as they were before they were packed."""
        return [[unpacked(leaf) for leaf in value] for value in self.values[:count]]

    def keep(self, step: Step, value: list[Any], own: bool = True) -> list[Any]:
        """Keep the value of a computed step.

        Args:
            step: the step.
            value: its leaves.
            own: whether its tensors are ours alone; others are copied, as other code may write into them.

        Returns:
            The value to go on with: ``value`` itself, or corrected for the errors of the forecasts before it.
        """
        steady = None
        if self._measures and len(self.values) > 1 and step.sigma not in self.sigmas:
            known = zip(value, *self._known(2), strict=True)
            steady = [extrapolation.steadiness(*x) if isinstance(x[0], torch.Tensor) else None for x in known]
        given = self._corrected(step, value, steady)
        if step.sigma in self.sigmas:  # second-order schedulers visit a noise level twice; the last visit counts
            again = self.sigmas.index(step.sigma)
            del self.values[again], self.sigmas[again]
        del self.values[self.order :], self.sigmas[self.order :]  # before the copy, which is never one too many
        if self._packed:
            value = [Packed.of(x.detach()) if isinstance(x, torch.Tensor) else x for x in value]
        elif not own:
            value = [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in value]
        self.values.insert(0, value)
        self.sigmas.insert(0, step.sigma)
        self.steady = steady if steady is not None else self.steady
        return given

    def used(self, decision: Decision) -> int:
        """Number of kept values from which a fill is made."""
        if decision.action != "forecast":
            return 1
        return len(self.sigmas[: None if decision.order is None else 1 + decision.order])

    def fill(self, step: Step, decision: Decision, weight: float | None = None) -> list[Any]:
        """The value that stands in at a step; where it is only repeated, it is the kept one itself.

        Args:
            step: the step.
            decision: gives the order and the damping.
            weight: the solver's weight of this step's output, if a later step is to correct for its error.
        """
        used = self.used(decision)
        factors = extrapolation.weights(self.sigmas[:used], step.sigma, decision.damping)
        if weight:
            self.forecasts.append((step.sigma, weight, factors))
        filled = []
        for place, known in enumerate(zip(*self._known(used), strict=True)):
            part = None
            if isinstance(known[0], torch.Tensor) and self._measures and used > 1:
                part = torch.as_tensor(self._share(place), device=known[0].device)
            tensor = isinstance(known[0], torch.Tensor)
            filled.append(extrapolation.extrapolate(known, factors, part) if tensor else known[0])
        return filled

    def passes(self, step: Step, value: list[Any], weight: float | None) -> None:
        """Take note of a value that was computed from what was filled inside, to be made good like a filled one.

        Args:
            step: the step.
            value: its leaves; they are not kept.
            weight: the solver's weight of this step's output, if it is to be corrected later.
        """
        if not weight:
            return
        self.forecasts.append((step.sigma, weight, []))
        before = self.passed or [0.0] * len(value)
        self.passed = [
            x.detach().to(torch.promote_types(x.dtype, torch.float32)) * weight + old
            if isinstance(x, torch.Tensor)
            else None
            for x, old in zip(value, before, strict=True)
        ]

    def _share(self, place: int) -> Any:
        """Share of a leaf's forecasts that is applied; 0 where there are too few values to tell."""
        return 0.0 if self.steady is None else extrapolation.share(self.steady[place])

    def _corrected(self, step: Step, value: list[Any], steady: Sequence[Any] | None) -> list[Any]:
        """A computed value, corrected for the errors of the forecasts before it.

        With the new value the skipped ones can be estimated better: the polynomial through it and the two values before
        is now evaluated between its nodes instead of beyond them. What the solver was given too much or too little is
        ``sum_s w_s (better_s - forecast_s)``, with the solver's weights ``w``. Divided by the weight of this step and
        added to its value, it reaches the latents at once. The sum is linear in the kept values, so only a few factors
        had to be remembered. How much of it is added depends on the length of the steps
        (:func:`~unicp.tensors.extrapolation.firmness`) and on how steadily the values change
        (:func:`~unicp.tensors.extrapolation.steadiness`): where they change unsteadily, interpolation tells nothing.

        Args:
            step: step of the value.
            value: what was computed; it is not changed.
            steady: steadiness of each leaf; ``None`` where there are too few values to tell.
        """
        skipped, self.forecasts = self.forecasts, []
        passed, self.passed = self.passed, []
        weight, known = step.weight, step.sigma in self.sigmas
        if steady is None or not skipped or not weight or known or step.weights is None:
            return value
        if not extrapolation.carries(weight, (w for _, w, _ in skipped)):
            return value
        nodes = [step.sigma, *self.sigmas[:2]]
        better, filled = [0.0] * (1 + len(self.sigmas)), [0.0] * (1 + len(self.sigmas))
        reused = 0.0  # weight of the newest kept value, for the share of forecasts that is not applied
        for at, w, used in skipped:
            for place, factor in enumerate(extrapolation.weights(nodes, at)):
                better[place] += w / weight * factor
            for place, factor in enumerate(used):
                filled[1 + place] += w / weight * factor
            reused += w / weight if used else 0.0
        left = sum(map(abs, step.weights[step.index :]))
        firm = extrapolation.firmness(abs(weight), left, abs(better[0] * weight))
        better[1] -= reused
        filled[1] -= reused
        changed = []
        for place, (new, *older) in enumerate(zip(value, *self._known(len(self.values)), strict=True)):
            if isinstance(new, torch.Tensor):
                wide = torch.promote_types(new.dtype, torch.float32)
                values = [new.to(wide), *(x.to(wide) for x in older)]
                off = extrapolation.extrapolate(values, better) - self._share(place) * extrapolation.extrapolate(
                    values, filled
                )
                if passed:
                    off = off - passed[place] / weight
                new = (values[0] + firm * steady[place] * off).to(new.dtype)
            changed.append(new)
        return changed
