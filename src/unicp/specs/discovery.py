"""Finds the structure of a denoiser that no spec describes, as far as its modules show it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from . import TIMESTEPS, BlockList, ModelSpec

MIN_PARAMETER_SHARE = 0.5
"""The list of blocks has to hold more than this share of the denoiser's parameters."""


def discover(denoiser: Any) -> ModelSpec | None:
    """A spec for a denoiser whose parameters lie mostly in one list of blocks of one class, or ``None``.

    The blocks are assumed to change the first argument of their forward and to return it, as a tensor of the same
    shape. If that is wrong, the first call raises an error that names block and shapes. Attention modules are not
    looked for, so the spec has no units, and the residual of a whole block takes the place of self-attention's. The
    number of frames is not known, so no motion is measured.
    """
    whole = _size(denoiser)
    path, blocks = max(_lists(denoiser), key=lambda found: _size(found[1]), default=("", None))
    if blocks is None or _size(blocks) <= MIN_PARAMETER_SHARE * whole:
        return None
    returns = str(inspect.signature(type(blocks[0]).forward).return_annotation).lower().removeprefix("typing.")
    if returns.startswith("tuple") and "|" not in returns:
        return None  # it says itself that it returns more than one
    arguments, streams = _arguments(denoiser), _arguments(blocks[0])
    if not arguments or not streams:
        return None
    return ModelSpec(
        family=f"{type(denoiser).__name__} (by its structure)",
        classes=(type(denoiser).__name__,),
        block_lists=(BlockList(path=path, streams=(streams[0],)),),
        frames=lambda denoiser, call: 1,
        timestep=next((name for name in TIMESTEPS if name in arguments), TIMESTEPS[0]),
        hidden=arguments[0],
    )


def _lists(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Lists of two or more modules of one class, by path; lists inside such a list are left out."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if type(child).__name__ == "ModuleList" and len(child) > 1 and len({type(block) for block in child}) == 1:
            yield path, child
        else:
            yield from _lists(child, f"{path}.")


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _arguments(module: Any) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]
