"""Cosmos 1, 2 and 2.5: self-attention, cross-attention and MLP, each behind a norm; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="cosmos",
        classes=("CosmosTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                residuals={"self_attention": None, "cross_attention": "norm2", "mlp": "norm3"},
                units={"attn1": "self_attention", "attn2": "cross_attention", "ff": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
