"""Turns a video into one picture, a sheet of frames as WebP, for a page that shows videos frame by frame in step."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..files.video import to_uint8

MAX_FRAME_SIDE = 320
"""Most pixels of a frame's long side in a sheet; larger videos are scaled down."""
MAX_FRAMES = 48
MAX_LOSSLESS_SIDE = 128
"""Frames with at most this many pixels per side are stored losslessly, so differences come from the methods alone."""
QUALITY = 88
MAX_SHEET_WIDTH = 16000
"""WebP's own limit is 16383 pixels."""


@dataclass(frozen=True)
class Layout:
    """The layout of frames in a sheet: row by row, with ``columns`` frames per row."""

    frames: int
    width: int
    height: int
    columns: int
    stride: int
    lossless: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layout(frames: int, height: int, width: int) -> Layout:
    """The layout of a video's sheet.

    >>> layout(81, 480, 832)
    Layout(frames=41, width=320, height=185, columns=7, stride=2, lossless=False)
    """
    factor = min(1.0, MAX_FRAME_SIDE / max(height, width))
    shown = (max(1, round(width * factor)), max(1, round(height * factor)))
    stride = math.ceil(frames / MAX_FRAMES)
    count = math.ceil(frames / stride)
    columns = max(1, min(count, MAX_SHEET_WIDTH // shown[0], math.ceil(math.sqrt(count))))
    return Layout(count, *shown, columns, stride, max(height, width) <= MAX_LOSSLESS_SIDE)


def sheet(video: Any) -> bytes:
    """A video (F, H, W, 3) in [0, 1] as the bytes of a WebP picture, laid out by :func:`layout`."""
    from PIL import Image

    frames = to_uint8(video)
    plan = layout(*frames.shape[:3])
    rows = math.ceil(plan.frames / plan.columns)
    page = Image.new("RGB", (plan.columns * plan.width, rows * plan.height))
    for number, frame in enumerate(frames[:: plan.stride]):
        picture = Image.fromarray(frame)
        if picture.size != (plan.width, plan.height):
            picture = picture.resize((plan.width, plan.height), Image.Resampling.LANCZOS)
        page.paste(picture, (number % plan.columns * plan.width, number // plan.columns * plan.height))
    buffer = io.BytesIO()
    if plan.lossless:
        page.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    else:
        page.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
