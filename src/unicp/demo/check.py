"""Checks from the pixels whether a video shows what its caption says; nothing in it is learnt.

:func:`check` finds the saturated objects of a video, follows each, and compares colours, number, motion and
speed with the caption. It is written for the scenes of :mod:`unicp.demo.scenes`: every threshold lies midway
between what two classes have there by construction.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from unicp.demo import scenes
from unicp.demo.scenes import COLOURS, DIRECTIONS, SHAPES, TEXTURES, TONES, Scene, Thing
from unicp.errors import UnicpError, missing_extra


def _middle(values: dict[str, float]) -> float:
    return (values["slow"] + values["fast"]) / 2


# Logarithm of the last radius over the first.
_GROWN = {speed: math.log(end / start) for speed, (start, end) in scenes.GROWTH.items()}
# A motion counts as there when it goes more than half of the slow way; as fast beyond the middle of slow and fast.
TRAVEL_SEEN, TRAVEL_FAST = scenes.TRAVEL["slow"] / 2, _middle(scenes.TRAVEL)
TURNS_SEEN, TURNS_FAST = scenes.TURNS["slow"] / 2, _middle(scenes.TURNS)
GROWN_SEEN, GROWN_FAST = _GROWN["slow"] / 2, _middle(_GROWN)
BOUNCES_FAST = _middle(scenes.BOUNCES)
BOUNCE_HEIGHT = 0.38
"""Height of a bounce, as `scenes` draws it. One bounce goes up and down: a way of twice that, and back where it was."""
BOUNCE_SEEN = BOUNCE_HEIGHT * scenes.BOUNCES["slow"]
TURNING_POINT = 0.04
"""Swings smaller than this are jitter. The smallest swing drawn, the end of a slow bounce, is 0.095."""
AREA_SEEN = 0.011
"""Half the area of the smallest object drawn (a triangle of radius 0.12 that grows fast, halfway), in sides squared."""
AREA_SPECK = 0.0025
"""A third of that smallest object at its smallest. Edges between two colours can look like specks of another colour."""
AREA_WHOLE = 0.5
"""Share of the object's median area below which a frame does not count for its position: the object is hidden."""
ROUNDNESS = 0.13
"""Outline harmonic below which an object has no corners to see turning, midway between the roundest square (0.25) and
the least round ball or ring (0.02) that `scenes` draws; triangles and stars have 0.45 and more."""
BLUR = 0.7 / 96
"""Width of the smoothing before colours are read, against noise, as a fraction of the side."""


def _chroma_plane(rgb: Any) -> Any:
    """The colour without its brightness, as a complex number: hue is the angle, colourfulness the length."""
    rgb = np.asarray(rgb, dtype=np.float32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return (red - (green + blue) / 2) + 1j * (math.sqrt(3) / 2) * (green - blue)


_HUES = np.exp(1j * np.angle(_chroma_plane(list(COLOURS.values()))))
CHROMA_SEEN = (
    0.7 * float(np.abs(_chroma_plane(list(COLOURS.values()))).min())  # the dullest object in its dimmest shade
    + 1.15 * float(np.abs(_chroma_plane(list(TONES.values()))).max())  # the most colourful background at its brightest
) / 2


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What an object does, measured over the clip.

    ``travel`` is the displacement (x, y) of the straight line that fits its way best and ``swing`` the vertical way
    beyond the net displacement, both in picture sides; ``bounces`` counts them; ``growth`` is the logarithm of the
    last radius over the first; ``turns`` the full turns it makes. ``kind`` is a motion of
    :class:`~unicp.demo.scenes.Thing`, ``speed`` ``"slow"``, ``"fast"`` or, when still, ``None``.
    """

    kind: str
    speed: str | None
    travel: tuple[float, float]
    swing: float
    bounces: float
    growth: float
    turns: float


@dataclass(frozen=True, kw_only=True)
class ThingCheck:
    """An object of the caption, and the object in the video that it was matched with, if any.

    ``colour`` and ``seen`` are ``None`` if there is none.
    """

    expected: Thing
    colour: str | None
    seen: Motion | None

    @property
    def direction_right(self) -> bool:
        return self.seen is not None and self.seen.kind == self.expected.motion

    @property
    def speed_right(self) -> bool:
        """Whether the speed is right; always ``True`` for an object that stands still, as its caption has no speed."""
        return self.expected.motion == "still" or (self.seen is not None and self.seen.speed == self.expected.speed)


@dataclass(frozen=True, kw_only=True)
class CaptionCheck:
    """Which parts of a caption are right (for all its objects at once), and what was measured.

    ``colour``: the colours named are seen, and no other. ``count``: as many objects are seen as named.
    ``direction``: each moves the way it should (left, bouncing, growing, ...). ``speed``: each is as slow or fast
    as it should; an object that stands still where it should move is neither.
    """

    colour: bool
    count: bool
    direction: bool
    speed: bool
    colours: tuple[str, ...]
    objects: int
    things: tuple[ThingCheck, ...]


_THING = re.compile(
    rf"an? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) "
    rf"(?:standing still|(?:moving ({'|'.join(DIRECTIONS)})|(bouncing|spinning|growing|shrinking)) (slowly|fast))"
)
_SCENE = re.compile(
    rf"(.+) over a ({'|'.join(TONES)}) ({'|'.join(TEXTURES)}) background(?:, the camera pans (left|right))?"
)


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes; what captions do not say (places, sizes, seed) has its default.

    >>> parse_caption("a red ball bouncing fast over a gray striped background").things[0].motion
    'bouncing'
    """
    scene = _SCENE.fullmatch(" ".join(caption.lower().split()))
    matches = [_THING.fullmatch(part) for part in scene[1].split(" and ")] if scene else []
    if scene is None or not all(matches):
        example = scenes.sample_scene(0).caption()
        raise UnicpError(f"cannot check the caption {caption!r}: it is not worded like {example!r}")
    things = tuple(
        Thing(shape=m[2], colour=m[1], motion=m[3] or m[4] or "still", speed="fast" if m[5] == "fast" else "slow")
        for m in matches
        if m
    )
    return Scene(things=things, tone=scene[2], texture=scene[3], pan=scene[4])


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise missing_extra("SciPy", "train", "caption checks") from error
    return ndimage


def _objects(video: Any) -> tuple[dict[str, Any], int]:
    """Masks (F, H, W) of the colours in a video, largest first, and the number of connected objects."""
    ndimage = _ndimage()
    side = min(video.shape[1:3])
    smooth = ndimage.gaussian_filter(video, (0, BLUR * side, BLUR * side, 0))
    chroma = _chroma_plane(smooth)
    vivid = np.abs(chroma) >= CHROMA_SEEN
    nearest = np.full(chroma.shape, -1)
    nearest[vivid] = np.argmax(np.real(chroma[vivid][:, None] * _HUES.conj()), axis=1)
    in_frame = np.zeros((3, 3, 3), dtype=bool)
    in_frame[1] = True  # Pixels touch those of the same frame only.
    found = []
    for index, name in enumerate(COLOURS):
        if np.count_nonzero(nearest == index) < AREA_SEEN * side**2:
            continue  # not even in one frame
        labels, _ = ndimage.label(nearest == index, in_frame)
        sizes = np.bincount(labels.ravel()) / side**2
        sizes[0] = 0  # the background
        mask = (sizes >= AREA_SPECK)[labels]
        if np.median(mask.sum((1, 2))) < AREA_SEEN * side**2:
            continue
        parts = np.zeros(len(video), dtype=int)
        for (frame, *_), size in zip(ndimage.find_objects(labels), sizes[1:], strict=True):
            parts[frame.start] += size >= AREA_SEEN
        found.append((int(mask.sum()), name, mask, parts))
    found.sort(key=lambda entry: -entry[0])
    count = int(np.median(sum(parts for *_, parts in found))) if found else 0
    return {name: mask for _, name, mask, _ in found}, count


def _turns(mask: Any, centre_x: Any, centre_y: Any, u: Any) -> float:
    """Full turns over the clip, from the rotation of the outline's 3-, 4- and 5-fold harmonics.

    The harmonic of a frame is a complex number that turns n times as fast as the object. The rate at which the frames
    add up best is the rate of turning: frames may be missing, and no angle has to be followed.
    """
    frame, y, x = np.nonzero(mask)
    offset = (x + 0.5 - centre_x[frame]) + 1j * (y + 0.5 - centre_y[frame])
    weight = np.abs(offset) ** 2
    unit = offset / np.maximum(np.abs(offset), 1e-9)
    total = np.bincount(frame, weight, len(mask))
    rates = np.asarray(sorted(np.linspace(-1.5, 1.5, 301), key=abs))  # of equally good rates, the slowest is taken
    best, turns = ROUNDNESS, 0.0
    for fold in (3, 4, 5):
        terms = weight * unit**fold
        harmonic = np.bincount(frame, terms.real, len(mask)) + 1j * np.bincount(frame, terms.imag, len(mask))
        harmonic /= np.maximum(total, 1e-9)
        sums = np.abs((harmonic[:, None] * np.exp(-2j * np.pi * fold * np.outer(u, rates))).mean(0))
        if sums.max() > best:
            best, turns = float(sums.max()), float(rates[sums.argmax()])
    return turns


def _swings(heights: Any) -> Any:
    """The turning points of a path (F,), including its ends, without jitter."""
    points = [float(heights[0])]
    rising = 0
    for value in map(float, heights[1:]):
        step = value - points[-1]
        if rising and step * rising > 0:
            points[-1] = value
        elif abs(step) >= TURNING_POINT:
            points.append(value)
            rising = 1 if step > 0 else -1
    return np.asarray(points)


def _pace(value: float, fast: float) -> str:
    return "fast" if abs(value) >= fast else "slow"


def measure(mask: Any, others: Any) -> Motion:
    """The motion of the object that ``mask`` (F, H, W) shows; ``others`` is where anything else may hide it."""
    frames, height, width = mask.shape
    side = min(height, width)
    u = np.linspace(0, 1, frames)
    area = mask.sum((1, 2)).astype(np.float64)
    # In pixels. Sums over columns and rows are enough for a centre of gravity.
    centre_x = mask.sum(1) @ (np.arange(width) + 0.5) / np.maximum(area, 1)
    centre_y = mask.sum(2) @ (np.arange(height) + 0.5) / np.maximum(area, 1)
    whole = area >= AREA_WHOLE * np.median(area)
    way_x, way_y = centre_x[whole] / side, centre_y[whole] / side
    travel_x, travel_y = (float(np.polyfit(u[whole], way, 1)[0]) for way in (way_x, way_y))
    points = _swings(way_y)
    way = float(np.abs(np.diff(points)).sum())
    swing = way - abs(float(points[-1] - points[0]))
    bounces = way / (2 * max(float(np.ptp(points)), TURNING_POINT))

    # Size and angle need frames in which nothing touches the object; if there are too few, whole ones serve.
    free = area > 0
    if others.any():
        free &= ~(mask & _ndimage().binary_dilation(others, np.ones((1, 5, 5), dtype=bool))).any((1, 2))
    if free.sum() < frames / 3:
        free = whole
    growth = float(np.polyfit(u[free], 0.5 * np.log(area[free]), 1)[0])
    turns = _turns(mask[free], centre_x[free], centre_y[free], u[free])

    kind, pace = "still", None
    strength = abs(growth) / GROWN_SEEN, abs(turns) / TURNS_SEEN
    if swing >= BOUNCE_SEEN:
        kind, pace = "bouncing", _pace(bounces, BOUNCES_FAST)
    elif max(abs(travel_x), abs(travel_y)) >= TRAVEL_SEEN:
        if abs(travel_x) > abs(travel_y):
            kind = "right" if travel_x > 0 else "left"
        else:
            kind = "down" if travel_y > 0 else "up"
        pace = _pace(math.hypot(travel_x, travel_y), TRAVEL_FAST)
    elif max(strength) >= 1 and strength[0] >= strength[1]:
        kind, pace = "growing" if growth > 0 else "shrinking", _pace(growth, GROWN_FAST)
    elif max(strength) >= 1:
        kind, pace = "spinning", _pace(turns, TURNS_FAST)
    return Motion(
        kind=kind, speed=pace, travel=(travel_x, travel_y), swing=swing, bounces=bounces, growth=growth, turns=turns
    )


def check(video: Any, caption: str | Scene) -> CaptionCheck:
    """Compare a video, (F, H, W, 3) in [0, 1], with a caption or the scene it comes from."""
    video = np.asarray(video, dtype=np.float32)
    if video.ndim != 4 or video.shape[-1] != 3 or len(video) < 5:
        raise UnicpError(f"cannot check a video of shape {video.shape}: (frames, height, width, 3), 5 frames or more")
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    masks, objects = _objects(video)
    # Each object is tracked by its colour. If its colour is missing it gets the largest object left over, so that a
    # wrong colour does not make its motion wrong too.
    spare = [name for name in masks if name not in {thing.colour for thing in scene.things}]
    things = []
    for thing in scene.things:
        colour = thing.colour if thing.colour in masks else spare.pop(0) if spare else None
        seen = None
        if colour is not None:
            others = [mask for name, mask in masks.items() if name != colour]
            seen = measure(masks[colour], np.any([np.zeros_like(masks[colour]), *others], axis=0))
        things.append(ThingCheck(expected=thing, colour=colour, seen=seen))
    return CaptionCheck(
        colour=set(masks) == {thing.colour for thing in scene.things},
        count=objects == len(scene.things),
        direction=all(thing.direction_right for thing in things),
        speed=all(thing.speed_right for thing in things),
        colours=tuple(masks),
        objects=objects,
        things=tuple(things),
    )
