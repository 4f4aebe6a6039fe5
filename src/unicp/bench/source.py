"""Identifies the code that results come from, where a version number does not."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from .. import __version__

PACKAGE = Path(__file__).parent.parent
UNRELATED_PARTS = ("bench/", "batch/", "cli/", "demo/", "__main__.py", "offline/inspect.py", "files/video.py")
"""Parts of the package that do not affect any method."""
REPORTING_FILES = ("charts.py", "comparison.py", "report.py", "results.py", "statistics.py")
"""Files of this folder that only process existing results."""


def digest(files: list[Path], root: Path = PACKAGE) -> str:
    """A short digest of files: of their names below ``root`` and their contents."""
    state = hashlib.sha256()
    for path in sorted(files):
        state.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()[:8]


@functools.cache
def code_version(part: str, version: str = __version__) -> str:
    """The version of unicp that results are kept under.

    A release is known by its number. Between releases one number stands for ever new code, so a digest of the source is
    added: results of other code are not used again.

    Args:
        part: ``"methods"``, what makes videos faster; or ``"measuring"``, what times and judges them.

    >>> code_version("methods", "1.0.0")
    '1.0.0'
    """
    if ".dev" not in version:
        return version
    if part == "methods":
        every = PACKAGE.rglob("*.py")
        files = [path for path in every if not path.relative_to(PACKAGE).as_posix().startswith(UNRELATED_PARTS)]
    else:
        own = [path for path in (PACKAGE / "bench").glob("*.py") if path.name not in REPORTING_FILES]
        files = [PACKAGE / "tensors" / "metrics.py", *own]
    return f"{version}+{digest(files)}"
