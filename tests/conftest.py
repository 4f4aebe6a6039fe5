"""What the tests of the command line share: a pipeline's folder with tiny random weights, and a way to call it.

What takes seconds to import is imported where it is used: the process that hands tests to the workers needs none of it.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from diffusers import WanPipeline

if "PYTEST_XDIST_WORKER" in os.environ:  # workers beside each other: one thread each, and in what they start
    os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("unicp", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unicp")


LONGEST = (
    *("parallel", "contract", "compile", "rehearse", "tuner", "cli_batch", "lifecycle", "calibration", "compare"),
    *("comfyui", "branches", "foreign_hooks", "cli_generate", "budget", "promise", "leap", "batch", "guider"),
    *("interruptions", "training", "session", "host_contract", "compare_kept", "lora", "reference", "threads"),
    *("which_step", "figures", "studio", "server_profiles", "modular", "feeds", "demo_scenes", "variants"),
)
"""Files of tests that take longest. They are first, so that no worker is left with one when the other is done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first. That the order is kept is up to how xdist is called."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need walk through it again, and the others are few."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """The garbage collector sees what is made in this test alone, which makes it fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SMALL = ["--size", "48x32", "--frames", "5", "--steps", "8"]


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pipeline of ``tests/wan_with_words.py``."""
    from tests import wan_with_words

    folder = tmp_path_factory.mktemp("tiny") / "model"
    wan_with_words.build().save_pretrained(folder)
    return folder


@pytest.fixture
def run(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Calls ``unicp generate`` with the tiny model, in an empty current folder. Returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    from unicp import cli

    def call(*arguments: str, model: str | None = None) -> int:
        return cli.main(["generate", "--model", model or str(wan_folder), *SMALL, *arguments])

    return call


@pytest.fixture(scope="module")
def pipe(wan_folder: Path) -> WanPipeline:
    """That pipeline; modules with another one have a fixture of their own."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed-ups of tuned plans by their steps, not as timed: tiny models are mostly overhead."""
    from unicp.offline import trials

    monkeypatch.setattr(trials.Tuner, "_overhead", lambda self: 0.1)
