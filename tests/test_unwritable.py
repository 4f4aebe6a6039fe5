"""Places that cannot be written to: said in one line before anything is loaded, and nothing is left behind."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unicp import cli
from unicp.batch import driver
from unicp.cli import pipelines

VERBS = {
    "generate": ["generate", "a red ball", "-o", "{place}/a.mp4"],
    "generate-compare": ["generate", "a red ball", "--compare", "-o", "{place}/"],
    "calibrate": ["calibrate", "a red ball", "-o", "{place}/a.safetensors"],
    "tune": ["tune", "a red ball", "-o", "{place}/a.safetensors"],
    "compare": ["compare", "a red ball", "--report", "{place}/a.html"],
    "compare-results": ["compare", "a red ball", "--report", "{folder}/a.html", "--results", "{place}/a.sqlite"],
    "batch": ["batch", "{folder}/prompts.txt", "-o", "{place}/clips"],
}


def words(verb: str, place: Path, folder: Path, model: Path) -> list[str]:
    return [word.format(place=place, folder=folder) for word in VERBS[verb]] + ["--model", str(model)]


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    (tmp_path / "file").write_text("x")
    return tmp_path


# Nobody, root neither, can make a file in /proc; a mode says otherwise of both.
PLACES = {"below a file": "{folder}/file", "of the kernel": "/proc", "a new folder in it": "/proc/new"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("verb", VERBS)
def test_it_is_said_before_anything_is_loaded(
    verb: str, place: str, folder: Path, wan_folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "/proc" in PLACES[place] and not sys.platform.startswith("linux"):
        pytest.skip("there is no /proc")
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr("unicp.batch.driver.Driver.run", lambda *_: pytest.fail("workers were started"))
    before = everything(folder)
    chosen = Path(PLACES[place].format(folder=folder))
    assert cli.main(words(verb, chosen, folder, wan_folder)) == 2
    _check(capsys.readouterr().err, chosen)
    assert everything(folder) == before


def _check(said: str, place: Path) -> None:
    assert said.startswith("error: cannot write ") and str(place) in said
    assert len(said.splitlines()) == 1 and "Traceback" not in said


@pytest.fixture
def modes(folder: Path, wan_folder: Path) -> Iterator[Path]:
    """A folder of mode 555, in which nothing can be made, and one of mode 000, into which one cannot even look."""
    for name, mode in (("seen", 0o555), ("hidden", 0o000)):
        (folder / name).mkdir()
        (folder / name).chmod(mode)
    above = {path: path.stat() for path in (folder, wan_folder, *folder.parents, *wan_folder.parents)}
    closed = [path for path, found in above.items() if found.st_uid == os.getuid() and not found.st_mode & 0o001]
    for path in closed:  # pytest's own folders are for one user only
        path.chmod(0o755)
    yield folder
    for path in closed:
        path.chmod(above[path].st_mode)
    for name in ("seen", "hidden"):
        (folder / name).chmod(0o755)


def test_no_permission(modes: Path, wan_folder: Path) -> None:
    """As a user whom modes bind, which they do not root: in a process of its own, which gives its rights away."""
    calls = [
        words(verb, modes / place, modes, wan_folder) for verb in VERBS for place in ("seen", "hidden", "hidden/deep")
    ]
    # What a refusal imports is imported before: nobody else may be able to read this Python.
    before_that = [words(verb, modes / "file", modes, wan_folder) for verb in VERBS]
    before = everything(modes)
    process = multiprocessing.get_context("fork").Process(target=_refused, args=(before_that, calls))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == 0  # otherwise it has said why
    assert everything(modes) == before


def _refused(before_that: list[list[str]], calls: list[list[str]]) -> None:
    """Gives the rights of root away; after that, each of these calls has to be refused in one line."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    pipelines.load = driver.Driver.run = never
    for each in before_that:
        with contextlib.redirect_stderr(io.StringIO()):
            assert cli.main(each) == 2
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for each in calls:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = cli.main(each)
        text = said.getvalue()
        assert code == 2, (each, code, text)
        assert text.startswith("error: cannot write ") and len(text.splitlines()) == 1, (each, text)
        assert "ermission denied" in text or "there is no folder" in text, (each, text)
