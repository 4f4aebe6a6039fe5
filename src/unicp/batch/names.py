"""File names from prompts."""

from __future__ import annotations

import re

MAX_SLUG_LENGTH = 60
"""Most characters of a slug."""
MAX_NAME_LENGTH = 240
"""Most bytes of a file name: file systems take 255, and suffixes such as ``.json`` need some of them."""


def slug(prompt: str, longest: int = MAX_SLUG_LENGTH) -> str:
    """A file name from a prompt: its words in lower case, as many as fit.

    >>> slug("A red ball, bouncing FAST!")
    'a-red-ball-bouncing-fast'
    """
    words = re.findall(r"[^\W_]+", prompt.lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word[:longest]
        if len(longer) > longest:
            break
        name = longer
    return name or "video"


def hashed(prompt: str, seed: int, key: str) -> str:
    """The stem of a clip's file: readable, and different for every clip whatever its options.

    Args:
        key: key of the clip (:func:`unicp.batch.clips.key_of`); its first 8 characters are used.

    >>> hashed("A red ball", 3, "0123456789abcdef")
    'a-red-ball-s3-01234567'
    """
    words = slug(prompt)
    while len(words.encode()) > MAX_NAME_LENGTH - 30:  # letters of more than one byte
        words = words[:-1]
    return f"{words}-s{seed}-{key[:8]}"


def vbench(prompt: str, index: int) -> str:
    """The stem that VBench looks for: the prompt itself, and the number of the video among those of the prompt, from 0.

    Raises:
        ValueError: no file can be called so.

    >>> vbench("a person is walking", 4)
    'a person is walking-4'
    """
    name = f"{prompt}-{index}"
    if any(character in prompt for character in "/\\\0\n\r") or prompt.startswith("."):
        raise ValueError(
            f"no file can be named after the prompt {prompt!r}: it has a slash, a line break or begins with a dot"
        )
    if len(name.encode()) > MAX_NAME_LENGTH:
        raise ValueError(f"no file can be named after a prompt of {len(prompt)} characters")
    return name
