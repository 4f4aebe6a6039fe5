"""Latte: spatial and temporal blocks alternate, each with its own folding into the batch; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2])


SPEC = register_spec(
    ModelSpec(
        family="latte",
        classes=("LatteTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                layout="spatial",
                measured=False,
                units={"attn1": "spatial_attention", "attn2": "cross_attention", "ff": "mlp"},
            ),
            BlockList(
                path="temporal_transformer_blocks",
                layout="temporal",
                residuals={"self_attention": None, "mlp": "norm2"},
                units={"attn1": "temporal_attention", "ff": "mlp"},
            ),
        ),
        interleaved=True,
        frames=_frames,
    )
)
