"""Finds the denoisers among the components of a pipeline."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnicpError
from .compiled import original

DENOISERS = ("transformer", "transformer_2")
"""Components of a pipeline that are accelerated, where it has them."""


def find_denoisers(target: Any) -> tuple[dict[str, Any], Any]:
    """The denoisers of a pipeline by name, and the pipeline. For a module: the module as its own denoiser, and
    ``None``.

    Raises:
        UnicpError: ``target`` is neither, or a pipeline without a denoiser.
    """
    if isinstance(target, torch.nn.Module):
        return {"transformer": original(target)}, None
    if not hasattr(target, "components"):
        raise UnicpError(
            f"accelerate and restore take a diffusers pipeline or a torch module, got {type(target).__name__}"
        )
    found = {name: getattr(target, name, None) for name in DENOISERS}
    denoisers = {name: original(module) for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not denoisers:
        raise UnicpError(
            f"{type(target).__name__} has no component named {' or '.join(DENOISERS)}; pass its denoiser itself"
        )
    return denoisers, target
