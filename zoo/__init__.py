"""The proving ground: small trained video models of many families, as ordinary diffusers pipelines.

    pipe, call = zoo.load("cogvideox")
    video = pipe(prompt="a red ball bouncing fast over a gray striped background", **call, output_type="np").frames[0]

Every member makes 13 frames of 96 x 96 pixels of what :mod:`unicp.demo.scenes` draws, with the demo's text encoder and
VAE. ``zoo/<member>`` has its weights, how it was trained and how good it is (``card.md``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from unicp.errors import UnicpError

FOLDER = Path(__file__).parent


class Loaded(NamedTuple):
    """A member's pipeline, and the arguments that its call takes besides the prompt."""

    pipe: Any
    call: dict[str, Any]


def names() -> tuple[str, ...]:
    """The members whose weights are there."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/card.md")))


def load(name: str) -> Loaded:
    """A member of the proving ground, in float32 on the CPU."""
    from training.zoo.members import member

    if name not in names():
        raise UnicpError(f"the proving ground has no member {name!r}: it has {', '.join(names()) or 'none yet'}")
    chosen = member(name)
    return Loaded(chosen.pipeline(chosen.load(FOLDER / name)), chosen.call())


def inputs(name: str, scene: Any) -> dict[str, Any]:
    """What a member's call takes for a scene of :mod:`unicp.demo.scenes` besides its caption: a picture, or nothing."""
    from training.zoo.members import member

    return member(name).inputs(scene)
