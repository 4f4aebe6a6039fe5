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
            BlockList(path="transformer_blocks", layout="spatial", measured=False),
            BlockList(
                path="temporal_transformer_blocks",
                layout="temporal",
                residuals={"self_attention": None, "mlp": "norm2"},
            ),
        ),
        interleaved=True,
        frames=_frames,
    )
)
