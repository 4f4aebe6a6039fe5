"""SANA-WM: linear attention along a camera's path, in some blocks softmax; one timestep per frame; (B, C, F, H, W)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return int(call["hidden_states"].shape[2] // denoiser.config.patch_size[0])


SPEC = register_spec(
    ModelSpec(
        family="sana-wm",
        classes=("SanaWMTransformer3DModel",),
        block_lists=(
            BlockList(
                path="blocks",
                streams=("x",),
                # cross_attn takes the un-normalised hidden states, with the camera's rays added.
                residuals={"self_attention": None, "cross_attention": "cross_attn", "mlp": "norm2"},
                units={"attn": "self_attention", "cross_attn": "cross_attention", "mlp": "mlp"},
            ),
        ),
        frames=_frames,
    )
)
