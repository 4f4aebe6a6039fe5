"""Functions that ``unicp calibrate`` and ``unicp tune`` share: prompts, a loaded pipeline, and saving the profile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnicpError
from . import options

if TYPE_CHECKING:
    from ..profiles import Profile

PROMPTS_HELP = "Prompts to run; by default, for the demo model, a few captions."
SEED_HELP = "Seed of the noise, which rises by 1 with every prompt."
DEMO_CAPTIONS = 30_000_000
"""Seed of the first default caption. These captions are of the training side; held-out ones are kept for judging."""


def check_output(output: Path) -> Path:
    """The file with the results so far, beside the profile.

    Raises:
        UnicpError: the profile cannot be written there.
    """
    if output.suffix != ".safetensors":
        raise UnicpError(f"-o {output} must end in .safetensors")
    if not os.path.isdir(output.absolute().parent):
        raise UnicpError(f"cannot write {output}: there is no folder {output.parent}")
    from ..files.whole import check_writable

    check_writable(output)
    return output.with_suffix(".part.safetensors")


def read_prompts(prompts: Sequence[str] | None, file: Path | None, model: str, default: int) -> list[str]:
    """The prompts that were given or, for the demo model, some of our own."""
    texts = list(prompts or [])
    if not texts and file is None:
        if model != "demo":
            raise UnicpError("give a few prompts of the kind the model will be used for, or --prompts-file")
        from ..demo import scenes

        texts = [scenes.sample_scene(DEMO_CAPTIONS + i).caption() for i in range(default)]
    return options.read_prompts(texts, file)


def load(model: str, given: Mapping[str, Any], device: str | None, dtype: str | None) -> tuple[Any, dict[str, Any]]:
    """The loaded pipeline, and the arguments of its call."""
    from . import calls, pipelines

    place, number = options.read_device(device, dtype)
    found = pipelines.find(model)
    call, _ = calls.build(found, dict(given), None)
    pipe = pipelines.load(found, place, number)
    calls.check_shape(pipe, call)
    return pipe, call


def write(profile: Profile, output: Path) -> None:
    """Save a profile, and say where it is and what to do with it. If its folder is gone, it is saved elsewhere.

    Raises:
        UnicpError: it could not be saved in its place; says where it is.
    """
    from .screen import results

    try:
        profile.save(output)
    except UnicpError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="unicp-")) / output.name
        profile.save(elsewhere)
        raise UnicpError(f"{error}; it is in {elsewhere} instead: move it where it is to be") from error
    screen = results()
    screen.print(f"wrote {output}; use it with: unicp generate PROMPT --method {output}", markup=False, soft_wrap=True)
    screen.print(f"look at it with: unicp inspect {output}", markup=False, soft_wrap=True)
