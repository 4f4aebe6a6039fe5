"""Kandinsky 6: a stream each for video and sound, each a block inside of a block; latents (B, F, H, W, C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[1] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="kandinsky6",
        classes=("Kandinsky6Transformer3DModel",),
        block_lists=(
            BlockList(
                path="visual_transformer_blocks",
                streams=("vis", "aud"),  # without sound, the second is None
                residuals={
                    "self_attention": None,
                    "cross_attention": "video_dec_block.cross_attention_norm",
                    "mlp": "video_dec_block.feed_forward_norm",
                },
                # Units of the video; those of the sound are always computed.
                units={
                    "video_dec_block.self_attention": "self_attention",
                    "video_dec_block.cross_attention": "cross_attention",
                    "va_cross_attention": "cross_attention",
                    "video_dec_block.feed_forward": "mlp",
                },
            ),
        ),
        frames=_frames,
    )
)
