"""Tensors that are divided among the processes of a group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def gathered(tokens: Any, group: Any) -> Any:
    """The hidden states (B, T, C) of all processes, joined in order; every process has the same number of tokens."""
    parts = [torch.empty_like(tokens, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tokens.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def averaged(values: Any, group: Any) -> Any:
    """The mean over all processes; NaN on one process is NaN on all."""
    return summed(values, group) / dist.get_world_size(group)


def summed(values: Any, group: Any) -> Any:
    """The sum over all processes."""
    values = values.contiguous()
    dist.all_reduce(values, group=group)
    return values
