"""The fill of a denoiser's whole output, in one guidance branch."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnicpError
from ...policies.base import Decision, Needs, Step
from ...tensors.private import pytree
from ..arguments import leaves
from .kept import Kept


def leading(output: Any) -> Any:
    """The first tensor in a denoiser's output: the video's, where there is sound too.

    Raises:
        UnicpError: there is none.
    """
    found = next((x for x in leaves(output) if isinstance(x, torch.Tensor)), None)
    if found is None:
        raise UnicpError(f"a denoiser's output must hold a tensor, got {type(output).__name__}")
    return found


class OutputFill:
    """Keeps outputs of the last computed steps, whatever their type: tensors, tuples, diffusers' own classes."""

    def __init__(self, needs: Needs) -> None:
        self.kept = Kept(needs.order, needs.steadiness)
        self._structure: Any = None

    def tensors(self) -> list[Any]:
        """Every tensor that is held."""
        return self.kept.tensors()

    def leading(self) -> list[Any]:
        """The first tensor of every kept output, newest first."""
        return [leading(value) for value in self.kept.values]

    def keep(self, step: Step, output: Any) -> Any:
        """Keep a computed output. Returns the output for the solver: itself, or a corrected one."""
        value, self._structure = pytree.tree_flatten(output)
        given = self.kept.keep(step, value, own=False)  # pipelines may change in place what they were given
        return output if given is value else pytree.tree_unflatten(given, self._structure)

    def passes(self, step: Step, output: Any, weight: float | None) -> None:
        """Take note of an output some of whose units were filled. See :meth:`Kept.passes`."""
        self.kept.passes(step, leaves(output), weight)

    def fill(self, step: Step, decision: Decision, weight: float | None = None) -> Any:
        """The output that stands in at a step, sharing no memory with what is kept. See :meth:`Kept.fill`."""
        held = {id(leaf) for leaf in self.kept.tensors()}
        value = [leaf.clone() if id(leaf) in held else leaf for leaf in self.kept.fill(step, decision, weight)]
        return pytree.tree_unflatten(value, self._structure)
