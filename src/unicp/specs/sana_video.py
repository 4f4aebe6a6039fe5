"""SANA-Video: linear self-attention, cross-attention, an MLP that mixes frames; latents (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="sana-video",
        classes=("SanaVideoTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                # attn2 takes the un-normalised hidden states, norm2 belongs to the MLP.
                residuals={"self_attention": None, "cross_attention": "attn2", "mlp": "norm2"},
                units={"attn1": "self_attention", "attn2": "cross_attention", "ff": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
