"""Wan VACE: a control branch runs before the blocks, its outputs are added between them; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec
from .wan import SPEC as WAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="wan-vace",
        classes=("WanVACETransformer3DModel",),
        block_lists=(
            # Not part of the stack: if the branch ends in a hint, it is added after the filled residual.
            BlockList(
                path="vace_blocks",
                streams=("control_hidden_states",),
                measured=False,
                stacked=False,
                units=WAN.block_lists[0].units,
            ),
            *WAN.block_lists,
        ),
        frames=_frames,
    )
)
