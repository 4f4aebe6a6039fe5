"""Context parallelism: each process has some of a video's tokens, and all have to decide the same.

So measurements are taken on the whole sequence, by the processes of the model's own group and no others: replicas of a
model are not in it, and never wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...errors import UnicpError
from ...tensors import private


def check_spread(kind: type, heads: Any, size: int) -> None:
    """Refuse a class of denoiser whose tokens diffusers cannot divide among ``size`` processes.

    Args:
        kind: the class.
        heads: number of its attention heads, from its configuration; anything but a whole number is not checked.
        size: number of processes.

    Raises:
        UnicpError: it has no plan for context parallelism, or its heads do not divide evenly.
    """
    if getattr(kind, private.PARALLEL_PLAN, None) is None:
        raise UnicpError(
            f"diffusers has no plan for context parallelism of a {kind.__name__}: it cannot be spread over {size} "
            "devices; use one for each worker"
        )
    if isinstance(heads, int) and heads % size:
        raise UnicpError(
            f"the {heads} attention heads of this {kind.__name__} cannot be shared evenly by {size} devices; use a "
            f"number that divides {heads}"
        )


def spread(denoisers: Sequence[Any], device: torch.device) -> None:
    """Divide the tokens of denoisers among all processes of the default group, with diffusers' Ulysses attention.

    Args:
        denoisers: the modules.
        device: the device of this process, on which the denoisers are.

    Raises:
        UnicpError: see :func:`check_spread`.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    for denoiser in denoisers:
        check_spread(type(denoiser), getattr(denoiser.config, "num_attention_heads", None), size)
    mesh = init_device_mesh(device.type, (1, size), mesh_dim_names=("ring", "ulysses"))
    for denoiser in denoisers:
        context = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
        if device.type != "cpu":
            denoiser.enable_parallelism(config=context)
            continue
        # `enable_parallelism` demands an accelerator, though nothing that it does needs one. This is what it does.
        config = private.parallel_config(context)
        config.setup(dist.get_rank(), size, device, mesh=mesh)
        for module in denoiser.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, private.PARALLEL_CONFIG):
                setattr(processor, private.PARALLEL_CONFIG, config)
        apply_context_parallel(denoiser, context, getattr(denoiser, private.PARALLEL_PLAN))
        setattr(denoiser, private.PARALLEL_CONFIG, config)


def group_of(denoiser: Any) -> Any:
    """The processes among which diffusers has divided a denoiser's tokens; ``None`` if it has not divided them.

    Raises:
        UnicpError: the parts have different sizes.
    """
    config = getattr(getattr(denoiser, private.PARALLEL_CONFIG, None), "context_parallel_config", None)
    group = private.mesh_group(config)
    if group is None:
        return None
    if getattr(config, "ulysses_anything", False) or getattr(config, "ring_anything", False):
        raise UnicpError(
            f"{type(denoiser).__name__} is context-parallel with parts of different sizes (ulysses_anything or "
            "ring_anything), of which unicp cannot measure the whole; choose a size of video whose tokens divide evenly"
        )
    return group


def shards_of(denoiser: Any) -> Any:
    """The processes among which FSDP has sharded a denoiser's weights; ``None`` if it has not sharded them.

    These processes have to run the same parts of the model at the same time, whatever video each of them makes.
    """
    modules = list(denoiser.modules())
    names = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in names:
        return next(module.process_group for module in modules if hasattr(module, "process_group"))
    for parameter in denoiser.parameters() if "FSDPModule" in names else ():
        for dimension, place in enumerate(getattr(parameter, "placements", ())):
            if place.is_shard():
                return parameter.device_mesh.get_group(dimension)
    return None


def check_shards(denoiser: Any, method: str, measures: bool, group: Any) -> None:
    """Refuse to decide from the measurements of one process where weights are sharded among several.

    Raises:
        UnicpError: the processes of one group would compute different steps, and wait for each other for ever.
    """
    if measures and group is None and group_of(denoiser) is None and shards_of(denoiser) is not None:
        raise UnicpError(
            f"the weights of this {type(denoiser).__name__} are sharded over processes (FSDP), which have to compute "
            f"the same steps, and {method} decides by what each of them measures; use a BudgetConfig or a "
            "ScheduleConfig, or let them decide together: accelerate(..., group=<the processes>)"
        )
