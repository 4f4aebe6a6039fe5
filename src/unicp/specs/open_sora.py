"""Open-Sora 1.2 (STDiT3), outside diffusers: spatial and temporal blocks alternate; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return -(-int(call["x"].shape[2]) // int(denoiser.patch_size[0]))  # an incomplete patch is padded


SPEC = register_spec(
    ModelSpec(
        family="open-sora",
        classes=("STDiT3",),
        block_lists=(
            # Each block folds its tokens into the batch by itself: both kinds see (B, F*S, C).
            BlockList(
                path="spatial_blocks",
                streams=("x",),
                measured=False,
                units={"attn": "spatial_attention", "cross_attn": "cross_attention", "mlp": "mlp"},
            ),
            BlockList(
                path="temporal_blocks",
                streams=("x",),
                residuals={"self_attention": None, "cross_attention": "cross_attn", "mlp": "norm2"},
                units={"attn": "temporal_attention", "cross_attn": "cross_attention", "mlp": "mlp"},
            ),
        ),
        frames=_frames,
        interleaved=True,
        hidden="x",
    )
)
