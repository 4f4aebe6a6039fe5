"""Names of the files of videos, and checks that they can be written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..batch.names import slug
from ..errors import UnicpError
from ..files.video import WRITERS, check_suffix
from ..files.whole import check_writable


@dataclass(frozen=True)
class Target:
    """The files of one video."""

    video: Path

    @property
    def suffix(self) -> str:
        return self.video.suffix.lower()

    @property
    def record(self) -> Path:
        """The JSON beside the video."""
        return self.video.with_suffix(".json")

    @property
    def baseline(self) -> Target:
        """The unaccelerated video of ``--compare``."""
        return Target(self.video.with_stem(self.video.stem + "-baseline"))

    @property
    def side_by_side(self) -> Path:
        """The video of both side by side."""
        return self.video.with_stem(self.video.stem + "-compare")

    def files(self, compare: bool) -> list[Path]:
        """Everything that will be written."""
        own = [self.video, self.record]
        return own + ([self.baseline.video, self.baseline.record, self.side_by_side] if compare else [])


def plan(prompts: Sequence[str], output: str | None, kind: str | None, compare: bool) -> list[Target]:
    """The files for the video of each prompt. They are checked, but not made yet.

    A name that was given is replaced if it exists. Names that are made up from prompts never replace anything: they
    get ``-2``, ``-3``, and so on.

    Args:
        prompts: prompts, of one video each.
        output: value of ``-o``: a file for one prompt, or a folder; ``None`` means the current folder.
        kind: value of ``--format``: ``"mp4"``, ``"gif"`` or ``"png"``.
        compare: whether the files of a comparison are wanted too.

    Raises:
        UnicpError: an unknown format, several prompts for one file, or a place that cannot be written to.
    """
    suffix = check_suffix(f"video.{kind.lower().lstrip('.')}") if kind else None
    place = Path(output or ".")
    folder = (
        output is None
        or os.path.isdir(place)
        or output.endswith(("/", os.sep))
        or (len(prompts) > 1 and not place.suffix)
    )
    if not folder:
        if len(prompts) > 1:
            raise UnicpError(f"-o {output} names one file, but there are {len(prompts)} prompts; name a folder")
        if not place.suffix:
            endings = ", ".join(f"{place.name}{ending}" for ending in WRITERS)
            raise UnicpError(f"-o {output} has no ending; name a file ({endings}) or a folder ({output}/)")
        if suffix not in (None, check_suffix(place)):
            raise UnicpError(f"-o {output} and --format {kind} contradict each other; leave one of them out")
        targets = [Target(place)]
    else:
        targets = []
        taken: set[Path] = set()
        for prompt in prompts:
            targets.append(_free(place, slug(prompt), suffix or ".mp4", compare, taken))
            taken.update(targets[-1].files(compare))
    for target in targets:
        _check_writable(target, compare)
    return targets


def _free(folder: Path, name: str, suffix: str, compare: bool, taken: set[Path]) -> Target:
    number = 1
    while True:
        target = Target(folder / f"{name}{f'-{number}' if number > 1 else ''}{suffix}")
        if not any(file in taken or os.path.exists(file) for file in target.files(compare)):
            return target
        number += 1


def _check_writable(target: Target, compare: bool) -> None:
    for file in target.files(compare):
        check_writable(file)
        if file.suffix == ".json" and file.exists() and not _is_ours(file):
            raise UnicpError(
                f"{file} exists and was not written by unicp, it would be lost; name another place with -o"
            )


def _is_ours(file: Path) -> bool:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "unicp" in values.get("versions", ())
