"""Videos as files: mp4, gif, or a png strip of frames. A file appears whole or not at all.

Frames are arrays (F, H, W, 3), of floats in [0, 1] or of uint8.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnicpError, unknown
from . import whole

MIN_SHOWN_SIDE = 288
"""Pixels of the short side up to which :func:`default_scale` enlarges small mp4 and gif videos."""
STRIP = 8
"""Most frames of a png strip."""
GAP = 4
"""Pixels between two videos in one picture; even, as h264 requires."""


def to_uint8(frames: Any) -> Any:
    """Frames (F, H, W, 3) as uint8, from uint8 or from floats in [0, 1], which are clipped.

    Raises:
        UnicpError: they have another shape.

    >>> to_uint8(np.full((1, 1, 1, 3), 0.5)).ravel().tolist()
    [128, 128, 128]
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UnicpError(f"a video is (frames, height, width, 3), got shape {frames.shape}")
    if frames.dtype == np.uint8:
        return frames
    return (np.clip(frames, 0, 1) * 255 + 0.5).astype(np.uint8)


def default_scale(height: int, width: int, suffix: str) -> int:
    """The whole factor by which a video is enlarged by default; a png strip is not enlarged.

    >>> default_scale(96, 96, ".mp4"), default_scale(480, 832, ".mp4"), default_scale(96, 96, ".png")
    (3, 1, 1)
    """
    return 1 if suffix == ".png" else max(1, math.ceil(MIN_SHOWN_SIDE / min(height, width)))


def enlarge(frames: Any, factor: int) -> Any:
    """Every pixel as ``factor`` x ``factor`` pixels."""
    return np.asarray(frames).repeat(factor, axis=1).repeat(factor, axis=2)


def strip(frames: Any, most: int = STRIP) -> Any:
    """At most ``most`` frames, evenly spaced from the first to the last, side by side: (1, H, n * W, 3)."""
    frames = np.asarray(frames)
    chosen = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)[None]


def labelled(frames: Any, label: str) -> Any:
    """The frames below a black header that says ``label``; the text shrinks to fit the width."""
    from PIL import Image, ImageDraw, ImageFont

    frames = to_uint8(frames)
    count, _, width, _ = frames.shape
    height = max(16, min(40, width // 12)) // 2 * 2
    size: float = 0.7 * height
    while size > 6 and ImageFont.load_default(size).getlength(label) > width - 8:
        size -= 1
    header = Image.new("RGB", (width, height))
    ImageDraw.Draw(header).text(
        (width / 2, height / 2), label, font=ImageFont.load_default(size), fill="white", anchor="mm"
    )
    return np.concatenate([np.broadcast_to(np.asarray(header), (count, height, width, 3)), frames], axis=1)


def side_by_side(left: Any, right: Any, labels: tuple[str, str], *, stacked: bool = False) -> Any:
    """Two videos of one shape in one, each below its label; ``stacked`` puts the second below the first."""
    a, b = (labelled(frames, label) for frames, label in zip((left, right), labels, strict=True))
    if a.shape != b.shape:
        raise UnicpError(f"videos differ in shape: {np.shape(left)} and {np.shape(right)}")
    between = list(a.shape)
    between[1 if stacked else 2] = GAP
    return np.concatenate([a, np.zeros(between, np.uint8), b], axis=1 if stacked else 2)


def comparison(left: Any, right: Any, labels: tuple[str, str], suffix: str) -> Any:
    """:func:`side_by_side` as suits the format: strips of frames are wide, so for png one is put below the other."""
    if suffix == ".png":
        return side_by_side(strip(left), strip(right), labels, stacked=True)
    return side_by_side(left, right, labels)


def _ffmpeg(frames: Any, target: Path, fps: float, arguments: list[str]) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    _, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    command = [get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *arguments, str(target)]
    done = subprocess.run(command, input=frames.tobytes(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"ffmpeg could not write {target.name}: {lines[-1]}")


def _write_mp4(frames: Any, target: Path, fps: float) -> None:
    # With colours at half resolution the sides must be even: an odd side repeats its last pixel.
    odd = [size % 2 for size in frames.shape[1:3]]
    frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
    # For an untagged video, players guess the colour standard from its size.
    tags = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
    colours = ["-vf", f"scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,{tags}"]
    quality = ["-c:v", "libx264", "-crf", "14", "-pix_fmt", "yuv420p"]
    _ffmpeg(frames, target, fps, [*colours, *quality, "-movflags", "+faststart", "-f", "mp4"])


def _write_gif(frames: Any, target: Path, fps: float) -> None:
    # One palette for all frames: one a frame would flicker.
    palette = "split[a][b];[a]palettegen=stats_mode=full[p];[b][p]paletteuse=dither=sierra2_4a"
    _ffmpeg(frames, target, fps, ["-vf", palette, "-loop", "0", "-f", "gif"])


def _write_png(frames: Any, target: Path, fps: float) -> None:
    from PIL import Image

    Image.fromarray(strip(frames)[0]).save(target, format="PNG")


WRITERS: dict[str, Callable[[Any, Path, float], None]] = {".mp4": _write_mp4, ".gif": _write_gif, ".png": _write_png}
"""Functions that write a file, by its suffix."""


def check_suffix(path: str | Path) -> str:
    """The suffix of a video's path in lower case.

    Raises:
        UnicpError: no such format can be written.

    >>> check_suffix("a.MP4")
    '.mp4'
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise unknown(f"format of {str(path)!r}: its ending", suffix, WRITERS)
    return suffix


def write(frames: Any, target: Path, *, suffix: str, fps: float, scale: int = 1) -> None:
    """Write frames in the format of ``suffix``, whatever ``target`` is called, enlarged ``scale`` times.

    A gif's frame times are whole hundredths of a second. A png is a strip of at most :data:`STRIP` frames.
    """
    WRITERS[suffix](np.ascontiguousarray(enlarge(to_uint8(frames), scale)), target, fps)


def save(frames: Any, path: str | Path, *, fps: float, scale: int | None = None) -> Path:
    """Write a video whole or not at all, and replace an existing file.

    Args:
        frames: (F, H, W, 3), floats in [0, 1] or uint8.
        path: path of the file; its suffix gives the format: ``.mp4``, ``.gif`` or ``.png``.
        fps: frames per second.
        scale: every pixel becomes ``scale`` x ``scale``; by default small videos are enlarged until their short side
            has at least 288 pixels (:func:`default_scale`).

    Raises:
        UnicpError: an unknown format, an unfit shape, or a folder that cannot be written to.
        RuntimeError: ffmpeg failed.
    """
    path = Path(path)
    suffix = check_suffix(path)
    frames = to_uint8(frames)
    with whole.staged(path) as part:
        height, width = frames.shape[1:3]
        factor = default_scale(height, width, suffix) if scale is None else scale
        write(frames, part, suffix=suffix, fps=fps, scale=factor)
    return path
