"""What is kept for one guidance branch from one computed step to the next, and what it fills in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree  # diffusers registers its outputs there

from ...errors import UnicpError
from ...policies import Needs, Plan, Step
from ...specs import BlockList
from ...tensors import extrapolation


def shape_of(value: Any) -> Any:
    """The shape of a tensor as a tuple; of anything else, its type's name."""
    return tuple(value.shape) if hasattr(value, "shape") else type(value).__name__


def check_streams(denoiser: Any, name: str, described: BlockList, values: list[Any], output: Any) -> None:
    """Whether a block has returned its streams, each in the shape in which it came.

    Raises:
        UnicpError: it has not.
    """
    returned = output if isinstance(output, tuple) else (output,)
    took, gave = [shape_of(value) for value in values], [shape_of(value) for value in returned]
    if took != gave:
        raise UnicpError(
            f"block {name!r} of {type(denoiser).__name__} took {' and '.join(described.streams)} of shape "
            f"{' and '.join(map(str, took))} and returned {' and '.join(map(str, gave))}; only blocks that return "
            "what they took, changed, can be passed over. Describe it with a ModelSpec (see BlockList.streams), or "
            "use a ScheduleConfig, which needs no blocks"
        )


def residuals(entered: Sequence[Any], left: Sequence[Any]) -> tuple[Any, ...]:
    """What was added to each stream; ``None`` for a stream that is not there (a video without sound)."""
    pairs = zip(entered, left, strict=True)
    return tuple(None if before is None else (after - before).detach() for before, after in pairs)


def leading(output: Any) -> Any:
    """The first tensor in a denoiser's output: of the video, where there is sound too."""
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor))


@dataclass
class BranchCache:
    """What is kept for one guidance branch.

    Attributes:
        residuals: of the stack, one a stream, in the last block's layout.
        outputs: the denoiser's outputs, newest first, each as its list of leaves: tensors, and what is none.
        sigmas: their noise levels.
        structure: how a filled output is put together from its leaves.
        forecasts: what was filled since the last computed step, as (sigma, the solver's weight of that step, factors
            of the kept outputs, newest first).
        blocks: how many blocks' hooks acted when the residuals were kept.
        steady: how steadily each leaf of the outputs changes; ``None`` where it was not measured yet.
    """

    residuals: tuple[Any, ...] | None = None
    outputs: list[list[Any]] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    structure: Any = None
    forecasts: list[tuple[float, float, list[float]]] = field(default_factory=list)
    steady: list[Any] | None = None
    blocks: int = 0

    def tensors(self) -> list[Any]:
        leaves = [*(self.residuals or ()), *(leaf for output in self.outputs for leaf in output)]
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def leading(self) -> list[Any]:
        """The first tensor of every kept output, newest first."""
        return [leading(output) for output in self.outputs]

    def take(self, step: Step, output: Any, needs: Needs) -> Any:
        """Keep a computed output for later fills.

        Returns:
            What the solver is to be given in its place: itself, or corrected.
        """
        steady = None
        if needs.steadiness and len(self.outputs) > 1 and step.sigma not in self.sigmas:
            steady = self._steadiness(output)
        given = self._corrected(step, output, steady)
        self.keep_output(step.sigma, output, needs.order)
        self.steady = steady if steady is not None else self.steady
        return given

    def _steadiness(self, output: Any) -> list[Any]:
        known = zip(pytree.tree_flatten(output)[0], *self.outputs[:2], strict=True)
        return [extrapolation.steadiness(*leaves) if isinstance(leaves[0], torch.Tensor) else None for leaves in known]

    def keep_output(self, sigma: float, output: Any, order: int) -> None:
        """Keep an output for a fill of this order."""
        if sigma in self.sigmas:  # second-order schedulers visit a noise level twice; the last visit counts
            again = self.sigmas.index(sigma)
            del self.outputs[again], self.sigmas[again]
        leaves, self.structure = pytree.tree_flatten(output)
        # A copy: pipelines may go on to change what they were given.
        self.outputs.insert(0, [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves])
        self.sigmas.insert(0, sigma)
        del self.outputs[order + 1 :], self.sigmas[order + 1 :]

    def _corrected(self, step: Step, output: Any, steady: list[Any] | None) -> Any:
        """A computed output, and what the forecasts before it were off by.

        With the new output the skipped ones can be told better: the polynomial through it and the two outputs before,
        between its nodes now instead of beyond them. What the solver has been given too much or too little is
        ``sum_s w_s (better_s - forecast_s)``, with the solver's weights ``w``; divided by the weight of this step and
        added to its output, the latents get it all at once. The sum is linear in the kept outputs, so nothing but a
        few factors had to be remembered. How much of it is added follows from the length of the steps
        (:func:`~unicp.tensors.extrapolation.firmness`) and from how steadily the outputs change
        (:func:`~unicp.tensors.extrapolation.steadiness`): where they do not, what lies between two of them is not to be
        told from them.

        Args:
            step: whose output it is.
            output: what the denoiser returned; it is not changed.
            steady: of its leaves; ``None`` where there are too few outputs to tell.
        """
        skipped, self.forecasts = self.forecasts, []
        weight, known = step.weight, step.sigma in self.sigmas
        if steady is None or not skipped or not weight or known or step.weights is None:
            return output
        if not extrapolation.carries(weight, (w for _, w, _ in skipped)):
            return output
        nodes = [step.sigma, *self.sigmas[:2]]
        better, filled = [0.0] * (1 + len(self.sigmas)), [0.0] * (1 + len(self.sigmas))
        reused = 0.0  # of the newest kept output, where a forecast is not believed in full
        for at, w, used in skipped:
            for place, factor in enumerate(extrapolation.weights(nodes, at)):
                better[place] += w / weight * factor
            for place, factor in enumerate(used):
                filled[1 + place] += w / weight * factor
            reused += w / weight
        left = sum(map(abs, step.weights[step.index :]))
        firm = extrapolation.firmness(abs(weight), left, abs(better[0] * weight))
        better[1] -= reused
        filled[1] -= reused
        leaves, structure = pytree.tree_flatten(output)
        changed = []
        for place, (new, *older) in enumerate(zip(leaves, *self.outputs, strict=True)):
            if isinstance(new, torch.Tensor):
                wide = torch.promote_types(new.dtype, torch.float32)
                values = [new.to(wide), *(value.to(wide) for value in older)]
                off = extrapolation.extrapolate(values, better) - self._share(place) * extrapolation.extrapolate(
                    values, filled
                )
                new = (values[0] + firm * steady[place] * off).to(new.dtype)
            changed.append(new)
        return pytree.tree_unflatten(changed, structure)

    def _share(self, place: int) -> Any:
        """Share of a leaf's forecasts that is believed. None of it, where there are too few outputs to tell."""
        return 0.0 if self.steady is None else extrapolation.share(self.steady[place])

    def filled_output(self, step: Step, plan: Plan, needs: Needs, weight: float | None = None) -> tuple[Any, str]:
        """What stands in for the output at a step, and the action as records call it.

        Args:
            step: which is skipped.
            plan: says from how many kept outputs, and how damped.
            needs: says whether forecasts go by how steadily the outputs change.
            weight: the solver's weight of this step's output, if it is to be corrected later.
        """
        kept = 1 if plan.action == "reuse" else len(self.sigmas) if plan.order is None else 1 + plan.order
        sigmas = self.sigmas[:kept]
        factors = extrapolation.weights(sigmas, step.sigma, plan.damping)
        if weight:
            self.forecasts.append((step.sigma, weight, factors))
        leaves = []
        for place, known in enumerate(zip(*self.outputs[: len(sigmas)], strict=True)):
            tensor = isinstance(known[0], torch.Tensor)
            part = None
            if tensor and needs.steadiness and len(sigmas) > 1:
                part = torch.as_tensor(self._share(place), device=known[0].device)
            value = extrapolation.extrapolate(known, factors, part) if tensor else known[0]
            leaves.append(value.clone() if tensor and value is known[0] else value)
        return pytree.tree_unflatten(leaves, self.structure), "forecast" if len(sigmas) > 1 else "reuse"
