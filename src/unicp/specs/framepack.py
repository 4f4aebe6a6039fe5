"""Framepack: HunyuanVideo with the tokens of earlier frames in front, at several scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import ModelSpec, register_spec
from .hunyuan_video import SPEC as HUNYUAN


def _frames(denoiser: Any, call: Mapping[str, Any]) -> int:
    return 1  # with the earlier frames at other scales, the tokens are no grid: no motion is measured


SPEC = register_spec(
    ModelSpec(
        family="framepack",
        classes=("HunyuanVideoFramepackTransformer3DModel",),
        block_lists=HUNYUAN.block_lists,
        frames=_frames,
        kept=1,
    )
)
