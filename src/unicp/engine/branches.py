"""What is kept for one guidance branch, and what its skipped steps are filled with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .. import fill
from ..policies import Plan


def tensor_in(output: Any) -> Any:
    """The tensor in a denoiser's output, which may be wrapped in a tuple or an output class."""
    return output if hasattr(output, "clone") else output[0]


@dataclass
class BranchCache:
    """What is kept for one guidance branch."""

    residuals: tuple[Any, ...] | None = None  # of the stack, one a stream, in the last block's layout
    outputs: list[Any] = field(default_factory=list)  # newest first
    sigmas: list[float] = field(default_factory=list)
    template: Any = None  # the type of the last output, where it is no plain tensor: what a filled one must look like

    def tensors(self) -> list[Any]:
        return [*(self.residuals or ()), *self.outputs]

    def keep(self, output: Any, sigma: float, order: int) -> None:
        """Keep a denoiser's output, and the ones before that an extrapolation of this order looks at."""
        value = tensor_in(output)
        if sigma in self.sigmas:  # second-order schedulers visit a noise level twice; the last visit counts
            again = self.sigmas.index(sigma)
            del self.outputs[again], self.sigmas[again]
        # A copy: pipelines may go on to change what they were given.
        self.outputs.insert(0, value.detach().clone())
        self.sigmas.insert(0, sigma)
        del self.outputs[order + 1 :], self.sigmas[order + 1 :]
        self.template = None if value is output else type(output)

    def filled(self, plan: Plan, sigma: float, order: int) -> tuple[Any, str]:
        """What stands in for the output at a noise level, in the type of the last one, and whether it is a forecast."""
        kept = 1 if plan.action == "reuse" else 1 + (order if plan.order is None else plan.order)
        sigmas = self.sigmas[:kept]
        value = fill.extrapolate(self.outputs[: len(sigmas)], fill.weights(sigmas, sigma, plan.damping))
        if value is self.outputs[0]:
            value = value.clone()
        action = "forecast" if len(sigmas) > 1 else "reuse"
        if self.template is None:
            return value, action
        return ((value,) if self.template is tuple else self.template(value)), action
