"""Helios: blocks like Wan's; with the tokens of earlier frames in front, at several scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import BlockList, ModelSpec, register_spec
from .wan import SPEC as WAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return 1  # with the earlier frames at other scales, the tokens are no grid: no motion is measured


SPEC = register_spec(
    ModelSpec(
        family="helios",
        classes=("HeliosTransformer3DModel",),
        block_lists=(
            BlockList(
                path="blocks",
                # Cross-attention may see the new frames only, so that its input cannot be compared with the block's:
                # its residual is counted with self-attention's.
                residuals={"self_attention": None, "mlp": "norm3"},
                units=WAN.block_lists[0].units,
            ),
        ),
        frames=_frames,
    )
)
