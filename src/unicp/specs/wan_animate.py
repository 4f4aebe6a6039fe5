"""Wan Animate: blocks like Wan's; attention to the face runs between them, and is in the residual of the stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ModelSpec, register_spec
from .wan import SPEC as WAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="wan-animate",
        classes=("WanAnimateTransformer3DModel",),
        block_lists=WAN.block_lists,
        frames=_frames,
    )
)
