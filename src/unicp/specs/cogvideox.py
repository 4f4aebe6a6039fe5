"""CogVideoX: joint attention over text and video, two streams through every block; latents (B, F, C, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    patch = denoiser.config.patch_size_t or 1
    return int((call["hidden_states"].shape[1] + patch - 1) // patch)


SPEC = register_spec(
    ModelSpec(
        family="cogvideox",
        classes=("CogVideoXTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                streams=("hidden_states", "encoder_hidden_states"),
                residuals={"self_attention": None, "mlp": "norm2"},
                units={"attn1": "joint_attention", "ff": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
