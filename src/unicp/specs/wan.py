"""Wan 2.1 and 2.2: self-attention, cross-attention and MLP, each with its residual; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="wan",
        classes=("WanTransformer3DModel",),
        block_lists=(
            BlockList(
                path="blocks",
                residuals={"self_attention": None, "cross_attention": "norm2", "mlp": "norm3"},
                units={"attn1": "self_attention", "attn2": "cross_attention", "ffn": "mlp"},
                plain_values=True,
            ),
        ),
        frames=_frames,
    )
)
