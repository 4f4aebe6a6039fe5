"""ConsisID: blocks like CogVideoX's; attention to the face runs between them; latents (B, F, C, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ModelSpec, register_spec
from .cogvideox import SPEC as COGVIDEOX


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[1])


SPEC = register_spec(
    ModelSpec(
        family="consisid",
        classes=("ConsisIDTransformer3DModel",),
        block_lists=COGVIDEOX.block_lists,
        frames=_frames,
    )
)
