"""Refuses denoisers that cannot be accelerated."""

from __future__ import annotations

from typing import Any

from ...errors import UnicpError
from ...policies.base import Needs
from ...specs.unsupported import KEEPS_KEYS, UNSUPPORTED
from ...tensors import private
from .parallel import check_shards


def check_denoiser(denoiser: Any, pipe: Any, method: str, needs: Needs, group: Any) -> None:
    """Refuse a denoiser of which no call may be skipped, or not by this method.

    Raises:
        UnicpError: it keeps keys from one call to the next, another cache acts on it, or its weights are sharded over
            processes that would decide apart.
    """
    kind = next((k.__name__ for k in type(denoiser).__mro__ if k.__name__ in KEEPS_KEYS), None)
    if kind is not None:
        raise UnicpError(f"{type(denoiser).__name__} cannot be accelerated: {UNSUPPORTED[kind]}")
    other, remedy = other_cache(denoiser, pipe)
    if other:
        raise UnicpError(
            f"{type(denoiser).__name__} has another cache already, {other}: two of them do not go together. "
            f"Turn it off with {remedy}, or leave unicp out"
        )
    check_shards(denoiser, method, bool(needs.metric or needs.unit_changes), group)


def other_cache(denoiser: Any, pipe: Any) -> tuple[str, str]:
    """Name of another library's cache on a denoiser, and how to turn it off; empty if there is none."""
    config = getattr(denoiser, private.CACHE_CONFIG, None)
    if config is not None:
        return f"diffusers' {type(config).__name__.removesuffix('Config')}", "transformer.disable_cache()"
    if getattr(denoiser, private.CACHE_DIT, False):
        return "cache-dit's", "cache_dit.disable_cache(pipe)"
    return "", ""
