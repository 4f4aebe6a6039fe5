"""Mochi: joint attention over text and video, two streams of different width; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2])


SPEC = register_spec(
    ModelSpec(
        family="mochi",
        classes=("MochiTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                streams=("hidden_states", "encoder_hidden_states"),
                residuals={"self_attention": None, "mlp": "norm3"},
                # The last block returns the text unchanged, and has no MLP for it.
                units={"attn1": "joint_attention", "ff": "mlp", "ff_context": "mlp"},
            ),
        ),
        frames=_frames,
        rising_timestep=True,
        kept=1,
    )
)
