"""LTX-Video: latents come packed as (B, T, C), their grid as arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call.get("num_frames") or 1)


SPEC = register_spec(
    ModelSpec(
        family="ltx",
        classes=("LTXVideoTransformer3DModel",),
        block_lists=(
            BlockList(
                path="transformer_blocks",
                # attn2 takes the un-normalised hidden states, norm2 belongs to the MLP.
                residuals={"self_attention": None, "cross_attention": "attn2", "mlp": "norm2"},
                units={"attn1": "self_attention", "attn2": "cross_attention", "ff": "mlp"},
                plain_values=True,
            ),
        ),
        frames=_frames,
    )
)
