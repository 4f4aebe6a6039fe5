"""EasyAnimate: joint attention over text and video, an MLP for each; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2])


SPEC = register_spec(
    ModelSpec(
        family="easyanimate",
        classes=("EasyAnimateTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                streams=("hidden_states", "encoder_hidden_states"),
                residuals={"self_attention": None, "mlp": "norm2"},
                units={"attn1": "joint_attention", "ff": "mlp", "txt_ff": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
