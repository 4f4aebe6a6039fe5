"""Gives every run a pipeline of its own, so that nothing a method leaves behind reaches another run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UnicpError
from ..tensors.private import HOOK_REGISTRY
from .harness import denoisers_of


@contextmanager
def without_offloading(pipe: Any) -> Iterator[Any]:
    """Take off what ``enable_model_cpu_offload`` has put on a pipeline, and put it on again afterwards.

    Yields the device to which its twins are to be offloaded likewise (:func:`fresh`), or ``None``.
    """
    device = pipe._offload_device if getattr(pipe, "_all_hooks", None) else None
    if device is None:
        yield None
        return
    pipe.remove_all_hooks()
    try:
        yield device
    finally:
        pipe.enable_model_cpu_offload(device=device)


def fresh(pipe: Any, offloaded_to: Any = None) -> Any:
    """A twin of a pipeline that shares its weights, but nothing else that a method may change.

    Denoisers and scheduler are new objects; text encoder and VAE are shared. The twin's class is a subclass made for it
    alone, with the same name: libraries that patch the pipeline's class (cache-dit does) patch that subclass.

    Args:
        pipe: the pipeline.
        offloaded_to: device that the twin's modules are to go to one at a time; see :func:`without_offloading`.

    Raises:
        UnicpError: an acceleration is in force on the pipeline, or its modules are offloaded.
    """
    denoisers = denoisers_of(pipe)
    for name, denoiser in denoisers.items():
        check_bare(pipe, name, denoiser)
    kind = type(pipe)
    # The subclass has the same name, because libraries look a pipeline up by the name of its class.
    isolated = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    twin = copy.copy(pipe)
    twin.__class__ = isolated
    parts = vars(twin)
    for name, denoiser in denoisers.items():
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*denoiser.parameters(), *denoiser.buffers())}
        parts[name] = copy.deepcopy(denoiser, shared)
    parts["scheduler"] = copy.deepcopy(pipe.scheduler)
    if offloaded_to is not None:
        twin.enable_model_cpu_offload(device=offloaded_to)
    return twin


def check_bare(pipe: Any, name: str, denoiser: Any) -> None:
    """Refuse a denoiser that is not as it was loaded, as it would not be a baseline.

    Raises:
        UnicpError: it has hooks, is offloaded, or has another library's cache.
    """
    what = type(pipe).__name__
    for module in denoiser.modules():
        hooks = getattr(getattr(module, HOOK_REGISTRY, None), "hooks", None)
        if hooks:
            raise UnicpError(
                f"the {name} of this {what} has the hook {next(iter(hooks))!r} on it; compare needs the bare pipeline: "
                "take it off first (unicp.restore(pipe), transformer.disable_cache())"
            )
        if hasattr(module, "_hf_hook"):
            raise UnicpError(
                f"the {name} of this {what} is offloaded part by part; compare takes pipelines that are on one device "
                "(pipe.to(...)) or offloaded model by model (pipe.enable_model_cpu_offload())"
            )
    if getattr(pipe, "_context_manager", None) is not None:
        raise UnicpError(
            f"cache-dit is enabled on this {what}; compare needs the bare pipeline: cache_dit.disable_cache(pipe)"
        )
