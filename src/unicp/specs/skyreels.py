"""SkyReels-V2: blocks like Wan's; with diffusion forcing one timestep per frame; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ModelSpec, register_spec
from .wan import SPEC as WAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="skyreels",
        classes=("SkyReelsV2Transformer3DModel",),
        block_lists=WAN.block_lists,
        frames=_frames,
    )
)
