"""LTX-2: a stream each for video and sound; packed latents (B, T, C), their grid as arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call.get("num_frames") or 1)


SPEC = register_spec(
    ModelSpec(
        family="ltx2",
        classes=("LTX2VideoTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                streams=("hidden_states", "audio_hidden_states"),
                residuals={
                    "self_attention": None,
                    "cross_attention": "norm2",
                    "audio": "audio_to_video_norm",
                    "mlp": "norm3",
                },
                # Units of the video; those of the sound are always computed.
                units={
                    "attn1": "self_attention",
                    "attn2": "cross_attention",
                    "audio_to_video_attn": "cross_attention",
                    "ff": "mlp",
                },
            ),
        ),
        frames=_frames,
    )
)
