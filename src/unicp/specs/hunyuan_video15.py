"""HunyuanVideo-1.5: blocks with a stream each for video and text; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ModelSpec, register_spec
from .hunyuan_video import SPEC as HUNYUAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size_t)


SPEC = register_spec(
    ModelSpec(
        family="hunyuan-video-1.5",
        classes=("HunyuanVideo15Transformer3DModel",),
        block_lists=HUNYUAN.block_lists[:1],
        frames=_frames,
        kept=1,
    )
)
