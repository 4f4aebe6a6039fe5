"""Kandinsky 5: text blocks, which are not part of the stack, then video blocks; latents (B, F, H, W, C)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[1] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="kandinsky5",
        classes=("Kandinsky5Transformer3DModel",),
        block_lists=(
            BlockList(
                path="visual_transformer_blocks",
                streams=("visual_embed",),
                residuals={
                    "self_attention": None,
                    "cross_attention": "cross_attention_norm",
                    "mlp": "feed_forward_norm",
                },
                units={"self_attention": "self_attention", "cross_attention": "cross_attention", "feed_forward": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
