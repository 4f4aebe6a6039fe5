"""One file per member of the proving ground."""

from __future__ import annotations

import importlib

from training.zoo.member import Member

NAMES = ("cogvideox", "hunyuan", "latte", "ltx", "open-sora", "wan-image", "wan-two", "wan-large-frame")


def member(name: str) -> Member:
    """The member of this name."""
    if name not in NAMES:
        raise ValueError(f"there is no member {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").MEMBER
