"""Motif-Video: blocks like HunyuanVideo's, optionally with text attention; the last single blocks are decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size_t)


SPEC = register_spec(
    ModelSpec(
        family="motif",
        classes=("MotifVideoTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                streams=("hidden_states", "encoder_hidden_states"),
                residuals={"self_attention": None, "mlp": "norm2"},
                units={"attn": "joint_attention", "cross_attn": "cross_attention", "ff": "mlp", "ff_context": "mlp"},
            ),
            # Attention and MLP run side by side here, and one projection takes the outputs of both: no sub-layer's
            # residual can be told apart, and where the projection is filled neither of them runs.
            BlockList(
                path="single_transformer_blocks",
                streams=("hidden_states", "encoder_hidden_states"),
                measured=False,
                units={
                    "proj_mlp": "mlp",
                    "attn": "joint_attention",
                    "cross_attn": "cross_attention",
                    "proj_out": "mlp",
                },
                feeds={"proj_mlp": "proj_out", "attn": "proj_out", "cross_attn": "proj_out"},
            ),
        ),
        frames=_frames,
        # Decoder blocks begin anew with the video that entered the stack, and take the encoded video as their text.
        kept=1,
    )
)
