"""Procedurally drawn, captioned videos, on which the demo model was trained and by which it is judged.

A :class:`Scene` is plain data. :func:`sample_scene` draws one, :meth:`Scene.caption` says it in words,
:func:`render` paints it. Everything follows from an integer seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.12),
    "green": (0.10, 0.75, 0.18),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.98, 0.88, 0.10),
    "purple": (0.60, 0.12, 0.80),
    "orange": (1.00, 0.50, 0.05),
    "cyan": (0.10, 0.85, 0.92),
    "pink": (1.00, 0.45, 0.75),
}
"""Object colours, RGB in [0, 1]. Backgrounds are muted, so that these stand out."""

TONES: dict[str, tuple[float, float, float]] = {
    "gray": (0.50, 0.50, 0.50),
    "brown": (0.50, 0.40, 0.30),
    "dark": (0.16, 0.16, 0.20),
    "light": (0.80, 0.80, 0.76),
}
SHAPES = ("ball", "square", "triangle", "star", "ring")
TEXTURES = ("striped", "checkered", "dotted", "gradient", "cloudy")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
"""Unit vectors (x, y) in image coordinates: y grows downwards."""

TRAVEL = {"slow": 0.26, "fast": 0.60}
"""Distance of a linear motion over the clip, as a fraction of the picture's side."""
BOUNCES = {"slow": 1.0, "fast": 2.0}
TURNS = {"slow": 0.15, "fast": 0.75}
GROWTH = {"slow": (0.85, 1.2), "fast": (0.55, 1.6)}
"""Size at the start and the end of a growing object, relative to its radius."""
PAN = 0.5
"""Distance a camera pan covers over the clip, as a fraction of the picture's width."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One moving object.

    ``motion`` is ``"still"``, ``"bouncing"``, ``"spinning"``, ``"growing"``, ``"shrinking"`` or a key of
    :data:`DIRECTIONS`; ``speed`` is ``"slow"`` or ``"fast"`` (ignored when still). ``x``, ``y`` and ``radius``
    are fractions of the picture's side.
    """

    shape: str
    colour: str
    motion: str
    speed: str
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.17
    angle: float = 0.0

    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        noun = f"{article} {self.colour} {self.shape}"
        adverb = "slowly" if self.speed == "slow" else "fast"
        if self.motion == "still":
            return f"{noun} standing still"
        if self.motion in DIRECTIONS:
            return f"{noun} moving {self.motion} {adverb}"
        return f"{noun} {self.motion} {adverb}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects over a background, and the camera's motion. ``seed`` draws the details outside the caption."""

    things: tuple[Thing, ...]
    texture: str = "striped"
    tone: str = "gray"
    pan: str | None = None
    seed: int = 0

    def caption(self) -> str:
        """The caption that a person would write.

        >>> ball = Thing(shape="ball", colour="red", motion="bouncing", speed="fast")
        >>> Scene(things=(ball,), texture="striped", tone="gray").caption()
        'a red ball bouncing fast over a gray striped background'
        """
        text = " and ".join(thing.caption() for thing in self.things)
        text += f" over a {self.tone} {self.texture} background"
        if self.pan:
            text += f", the camera pans {self.pan}"
        return text


def is_held_out(caption: str) -> bool:
    """Whether a caption is never trained on: one in twenty, by its hash."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little") % 20 == 0


def _sample_thing(rng: np.random.Generator, colour: str, lane: int | None) -> Thing:
    motion = str(
        rng.choice(
            ["still", "left", "right", "up", "down", "bouncing", "spinning", "growing", "shrinking"],
            p=[0.10, 0.13, 0.13, 0.13, 0.13, 0.13, 0.09, 0.08, 0.08],
        )
    )
    # A turning ball or ring looks like a still one.
    shape = str(rng.choice(SHAPES if motion != "spinning" else ("square", "triangle", "star")))
    speed = str(rng.choice(["slow", "fast"]))
    jitter = rng.uniform(-0.06, 0.06, size=2)
    x, y = 0.5 + jitter[0], 0.5 + jitter[1]
    radius = rng.uniform(0.15, 0.19)
    if lane is not None:
        radius = rng.uniform(0.12, 0.15)
        side = -0.22 if lane == 0 else 0.22
        # Two objects keep to lanes of their own, so that neither hides the other for long.
        if motion in ("left", "right"):
            y += side
        elif motion in ("up", "down", "bouncing"):
            x += side
        else:
            x, y = x + side, y + side
    return Thing(
        shape=shape,
        colour=colour,
        motion=motion,
        speed=speed,
        x=float(x),
        y=float(y),
        radius=float(radius),
        angle=float(rng.uniform(-0.25, 0.25)),
    )


def sample_scene(seed: int, *, held_out: bool = False) -> Scene:
    """Draw a scene whose caption is (or is not) held out of training.

    >>> sample_scene(3) == sample_scene(3)
    True
    >>> is_held_out(sample_scene(3, held_out=True).caption())
    True
    """
    rng = np.random.default_rng(seed)
    while True:
        count = 1 if rng.random() < 0.7 else 2
        colours = [str(c) for c in rng.choice(list(COLOURS), size=count, replace=False)]
        things = tuple(_sample_thing(rng, c, None if count == 1 else i) for i, c in enumerate(colours))
        pan = str(rng.choice(["left", "right"])) if rng.random() < 0.2 else None
        scene = Scene(
            things=things,
            texture=str(rng.choice(TEXTURES)),
            tone=str(rng.choice(list(TONES))),
            pan=pan,
            seed=int(rng.integers(2**31)),
        )
        if is_held_out(scene.caption()) == held_out:
            return scene


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """``count`` scenes with distinct captions that the demo model never saw in training."""
    found: dict[str, Scene] = {}
    offset = seed * 1_000_003
    while len(found) < count:
        scene = sample_scene(offset, held_out=True)
        found[scene.caption()] = scene
        offset += 1
    return list(found.values())


def prompts(count: int, seed: int = 0) -> list[str]:
    """The captions of :func:`held_out_scenes`.

    >>> len(set(prompts(5)))
    5
    """
    return [scene.caption() for scene in held_out_scenes(count, seed)]


def _smooth(x: Any, width: float) -> Any:
    return np.clip(x / width + 0.5, 0.0, 1.0)


def _background(scene: Scene, u: Any, x: Any, y: Any, pixel: float) -> Any:
    """Texture value in [0, 1] for each frame, (F, H, W, 3) after tinting."""
    rng = np.random.default_rng(scene.seed)
    if scene.pan:
        # The camera pans left: the world moves right in the picture.
        x = x - PAN * u * (1.0 if scene.pan == "left" else -1.0)
    phase = rng.uniform(0, 1, size=2).astype(np.float32)
    if scene.texture == "striped":
        angle = rng.choice([0.0, 0.25, 0.5]) * np.pi
        wave = np.sin(2 * np.pi * (rng.uniform(4, 6) * (np.cos(angle) * x + np.sin(angle) * y) + phase[0]))
        value = _smooth(wave, 24 * pixel)
    elif scene.texture == "checkered":
        k = rng.uniform(2.5, 3.5)
        wave = np.sin(2 * np.pi * (k * x + phase[0])) * np.sin(2 * np.pi * (k * y + phase[1]))
        value = _smooth(wave, 16 * pixel)
    elif scene.texture == "dotted":
        k = rng.uniform(4.5, 6.0)
        dx = (k * x + phase[0]) % 1.0 - 0.5
        dy = (k * y + phase[1]) % 1.0 - 0.5
        value = _smooth(0.28 - np.sqrt(dx**2 + dy**2), 2 * k * pixel)
    elif scene.texture == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        value = 0.5 + 0.7 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
        value = np.clip(value, 0.0, 1.0)
    else:  # cloudy
        value = 0.5
        for _ in range(5):
            kx, ky = rng.normal(0, 2.2, size=2)
            value = value + 0.17 * np.sin(2 * np.pi * (kx * x + ky * y + rng.uniform()))
        value = np.clip(value, 0.0, 1.0)
    base = np.asarray(TONES[scene.tone], dtype=np.float32)
    low, high = base * 0.72, np.clip(base * 1.15 + 0.07, 0, 1)
    value = np.asarray(value, dtype=np.float32)[..., None]
    return low + (high - low) * value


def _edge(shape: str, theta: Any, rho: Any) -> Any:
    """Signed distance to the outline of a unit shape, positive inside (approximate away from it)."""
    if shape == "ball":
        return 1.0 - rho
    if shape == "ring":
        return 0.28 - np.abs(rho - 0.75)
    if shape == "square":
        return 0.85 - np.maximum(np.abs(rho * np.cos(theta)), np.abs(rho * np.sin(theta)))
    if shape == "triangle":
        third = 2 * np.pi / 3
        folded = (theta + np.pi / 2 + np.pi / 3) % third - third / 2
        return 0.58 - rho * np.cos(folded)
    fifth = (theta + np.pi / 2) * 5 / (2 * np.pi) % 1.0
    return 0.45 + 0.7 * np.abs(1 - 2 * fifth) - rho  # star


def _draw_thing(thing: Thing, frames: Any, u: Any, x: Any, y: Any, pixel: float) -> Any:
    centre_x, centre_y, radius, angle = thing.x, thing.y, thing.radius, thing.angle
    if thing.motion in DIRECTIONS:
        dx, dy = DIRECTIONS[thing.motion]
        travel = TRAVEL[thing.speed]
        # The middle of the way lies near the middle of the picture; across it the lane is kept.
        centre_x = centre_x + dx * travel * (u - 0.5)
        centre_y = centre_y + dy * travel * (u - 0.5)
    elif thing.motion == "bouncing":
        centre_y = 0.70 - 0.38 * np.abs(np.sin(np.pi * (BOUNCES[thing.speed] * u + 0.08)))
    elif thing.motion == "spinning":
        angle = angle + 2 * np.pi * TURNS[thing.speed] * u
    elif thing.motion in ("growing", "shrinking"):
        start, end = GROWTH[thing.speed]
        if thing.motion == "shrinking":
            start, end = end, start
        radius = radius * start * (end / start) ** u
    px, py = (x - centre_x) / radius, (y - centre_y) / radius
    rho, theta = np.sqrt(px**2 + py**2), np.arctan2(py, px) - angle
    alpha = _smooth(_edge(thing.shape, theta, rho), 1.5 * pixel / radius)[..., None]
    light = np.clip(0.92 - 0.16 * (px + py), 0.7, 1.15)[..., None]
    colour = np.clip(np.asarray(COLOURS[thing.colour], dtype=np.float32) * light, 0, 1)
    return frames * (1 - alpha) + colour * alpha


def render(scene: Scene, *, frames: int = 13, height: int = 96, width: int = 96) -> Any:
    """Paint a scene.

    Returns a float32 array (F, H, W, 3) in [0, 1].

    >>> render(sample_scene(0), frames=5, height=32, width=32).shape
    (5, 32, 32, 3)
    """
    side = min(height, width)
    pixel = 1.0 / side
    u = np.linspace(0, 1, frames, dtype=np.float32)[:, None, None]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / side + 0.5)[None, :, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / side + 0.5)[None, None, :]
    video = np.broadcast_to(_background(scene, u, x, y, pixel), (frames, height, width, 3))
    for thing in reversed(scene.things):
        video = _draw_thing(thing, video, u, x, y, pixel)
    return np.ascontiguousarray(video, dtype=np.float32)
