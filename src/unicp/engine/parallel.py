"""Context parallelism: each process has some of a video's tokens, and all have to decide the same.

So what is measured is measured on the whole sequence, by the processes of the model's own group and no others:
replicas of a model are not in it, and never wait for each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnicpError


def group_of(denoiser: Any) -> Any:
    """The processes over which diffusers has spread a denoiser's tokens; ``None`` if it has not.

    Raises:
        UnicpError: it has, in parts of different sizes.
    """
    config = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    if mesh is None:
        return None
    if getattr(config, "ulysses_anything", False) or getattr(config, "ring_anything", False):
        raise UnicpError(
            f"{type(denoiser).__name__} is context-parallel with parts of different sizes (ulysses_anything or "
            "ring_anything), of which unicp cannot measure the whole; choose a size of video whose tokens divide evenly"
        )
    return mesh.get_group()


def gathered(tokens: Any, group: Any) -> Any:
    """The hidden states (B, T, C) of all processes, in order; of each the same share of tokens."""
    parts = [torch.empty_like(tokens, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tokens.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def summed(values: Any, group: Any) -> Any:
    """The sum over all processes."""
    values = values.contiguous()
    dist.all_reduce(values, group=group)
    return values
