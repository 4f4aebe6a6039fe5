"""Builds the arguments of a pipeline's call, and checks that the pipeline supports them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from .. import demo
from ..errors import UnicpError
from .model import Model

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "--steps": ("num_inference_steps",),
    "--guidance": ("guidance_scale",),
    "--frames": ("num_frames", "video_length"),
    "--size": ("width", "height"),
    "--negative": ("negative_prompt",),
}
"""Names of each option in pipelines: the first that a pipeline takes is used (for a size, both)."""

# Attributes of pipelines that say how many pixels or frames one latent stands for.
SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
DEFAULT_FPS = 16.0


def demo_defaults() -> dict[str, Any]:
    """The defaults of the demo model: what it was trained for."""
    size = (demo.WIDTH, demo.HEIGHT)
    return {"--steps": demo.STEPS, "--guidance": demo.GUIDANCE, "--frames": demo.FRAMES, "--size": size}


def build(
    model: Model, options: Mapping[str, Any], fps: float | None, supplied: Collection[str] = ("prompt",)
) -> tuple[dict[str, Any], float]:
    """Arguments for the pipeline's call, and the frames per second of the file.

    Only what was asked for is passed on, so that every pipeline keeps its own defaults; the demo model's are those
    of :mod:`unicp.demo`.

    Args:
        options: values by option, as in :data:`ARGUMENTS`; ``None`` where an option was not given.
        fps: value of ``--fps``; pipelines that take a frame rate are given this one.
        supplied: arguments that the caller adds to the call.

    Raises:
        UnicpError: the pipeline makes no video from text, or does not take an option that was given.
    """
    takes = inspect.signature(model.pipeline.__call__).parameters
    name = model.pipeline.__name__
    frames = [word for word in ARGUMENTS["--frames"] if word in takes]
    if "prompt" not in takes or not frames:
        raise UnicpError(f"{model.name} is a {name}, which does not make videos from text; name another --model")
    needed = [
        word
        for word, parameter in list(takes.items())[1:]
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and word not in supplied
    ]
    if needed:
        raise UnicpError(f"{model.name} is a {name}, which needs {needed[0]!r} too; name a text-to-video --model")
    for word in supplied:
        if word not in takes:
            raise UnicpError(f"{name} does not take {word!r}; leave it out, or name another --model")
    given = {option: value for option, value in options.items() if value is not None}
    call: dict[str, Any] = {}
    for option, value in {**(demo_defaults() if model.is_demo else {}), **given}.items():
        words = [word for word in ARGUMENTS[option] if word in takes]
        if not words:
            raise UnicpError(f"{name} does not take {option}; leave it out")
        call.update(zip(words, value, strict=True) if option == "--size" else {words[0]: value})
    if fps is None:
        default = takes["frame_rate"].default if "frame_rate" in takes else DEFAULT_FPS
        return call, float(demo.FPS) if model.is_demo else float(default)
    if "frame_rate" in takes:
        call["frame_rate"] = fps
    return call, fps


def check_shape(pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse sizes and lengths that do not divide into latents and patches; pipelines would silently change them.

    Raises:
        UnicpError: with the nearest values that fit.
    """
    name = type(pipe).__name__
    for word, step in zip(("width", "height"), _pixel_steps(pipe), strict=True):
        value = call.get(word)
        if value is not None and value % step:
            raise UnicpError(
                f"{word} {value} is not a multiple of {step}, as {name} needs; nearest: {_near(value, step)}"
            )
    step = _attribute(pipe, TEMPORAL)
    for word in ARGUMENTS["--frames"]:
        value = call.get(word)
        if value is not None and (value - 1) % step:
            near = _near(value - 1, step, add=1)
            raise UnicpError(
                f"--frames {value} is not 1 more than a multiple of {step}, as {name} needs; nearest: {near}"
            )


def _near(value: int, step: int, add: int = 0) -> str:
    below = value // step * step
    return " or ".join(str(v + add) for v in (below, below + step) if v + add > 0)


def _attribute(pipe: Any, names: tuple[str, ...]) -> int:
    values: Iterator[Any] = (getattr(pipe, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 1)


def _pixel_steps(pipe: Any) -> tuple[int, int]:
    """Pixels of one patch of latents: horizontal, vertical."""
    patch = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "patch_size", 1)
    sides = list(patch)[-2:] if isinstance(patch, (list, tuple)) else [patch, patch]
    vertical, horizontal = sides if len(sides) == 2 else (1, 1)
    pixels = _attribute(pipe, SPATIAL)
    return pixels * int(horizontal or 1), pixels * int(vertical or 1)
