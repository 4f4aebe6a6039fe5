"""The arguments of a module's forward, by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..tensors.private import pytree

_LEAVES = (torch.Tensor, type(None), bool, int, float, str)


def parameters(module: Any) -> list[str]:
    """Names of the arguments that a module's forward takes, without ``self``."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def leaves(value: Any) -> list[Any]:
    """The values in lists, tuples and dicts, however deep; of anything else, the value itself.

    Most arguments are a tensor or nothing, and at every call of a denoiser torch's own walk would be most of the cost.
    """
    return [value] if isinstance(value, _LEAVES) else pytree.tree_leaves(value)


def named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}
