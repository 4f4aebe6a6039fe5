"""The studio without a browser: what a page asks for, how its videos are made, cancelled and shown."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unicp
from unicp import cli
from unicp.cli import running
from unicp.cli import studio as verb
from unicp.cli.options import read_method
from unicp.errors import UnicpError
from unicp.studio import request as asking
from unicp.studio import server, views
from unicp.studio.job import CANCELLED, DONE, FAILED, Job
from unicp.studio.request import Request, configure, methods
from unicp.studio.workshop import Workshop

PROMPT = "a red ball bouncing"
SMALL = {"--size": "48x32", "--frames": 5, "--steps": 8}
EVERY_SECOND = unicp.ScheduleConfig(interval=2)


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return Workshop(verb.backend("cpu", None))


@pytest.fixture
def ask(wan_folder: Path) -> Callable[..., Request]:
    def request(**changes: Any) -> Request:
        options = {**SMALL, **changes.pop("options", {})}
        return Request(
            **{"prompt": PROMPT, "model": str(wan_folder), "config": EVERY_SECOND, **changes}, options=options
        )

    return request


def finished(job: Job, patience: float = 60) -> Job:
    until = time.monotonic() + patience
    while not job.over:
        assert time.monotonic() < until, f"still {job.state}"
        time.sleep(0.01)
    return job


# --- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods())
def test_the_slider_goes_from_mild_to_bold(method: str) -> None:
    kinds = {type(configure(method, speed, 50, {})) for speed in (1.25, 2.0, 3.0, 4.0)}
    assert len(kinds) == 1
    assert configure(method, 1.25, 50, {}) != configure(method, 4.0, 50, {})


def test_a_budget_is_told_the_speed_of_the_slider() -> None:
    assert configure("budget", 2.75, 50, {}) == unicp.BudgetConfig(target_speedup=2.75)
    assert configure("budget", 2.75, 50, {"leap": 0.0}) == unicp.BudgetConfig(target_speedup=2.75, leap=0.0)


@pytest.mark.parametrize("method", methods())
def test_the_command_and_the_python_ask_for_the_same(method: str) -> None:
    config = configure(method, 3.0, 50, {})
    words = shlex.split(Request(prompt="it's a cat; rm", config=config, seed=3, options=SMALL).command())
    assert words[:3] == ["unicp", "generate", "it's a cat; rm"]
    assert words[-9:] == ["--seed", "3", "--size", "48x32", "--frames", "5", "--steps", "8", "--compare"]
    settings = [value for name, value in pairwise(words) if name == "--set"]
    assert read_method(words[words.index("--method") + 1], settings) == config
    assert eval(asking.as_python(config), {"unicp": unicp}) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"seed": -1}, "the seed must be a whole number from 0"),
        ({"seed": 2**32}, "the seed must be a whole number from 0"),
    ],
)
def test_what_cannot_be_asked_for(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnicpError, match=message):
        Request(**{"prompt": PROMPT, "config": EVERY_SECOND, **values})


def test_an_unknown_method_is_said_with_the_nearest() -> None:
    with pytest.raises(UnicpError, match="Did you mean 'budget'"):
        configure("budgte", 2, 50, {})


# --- how it is made -------------------------------------------------------------------------------------------------


def test_both_videos_and_what_the_page_copies(workshop: Workshop, ask: Callable[..., Request]) -> None:
    job = finished(workshop.submit(ask(seed=5)))
    assert job.state == DONE, job.error
    result = job.result
    assert result is not None and result.made.report is not None
    assert result.made.report.computed_steps < result.plain.steps == 8
    assert not np.array_equal(result.made.frames, result.plain.frames) and 0 < result.psnr < 200
    namespace: dict[str, Any] = {}
    exec(result.prepared.python(result.request), namespace)
    assert np.array_equal(namespace["video"], result.made.frames)  # bit for bit


def test_the_copied_command_makes_the_same_video(
    workshop: Workshop, ask: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = finished(workshop.submit(ask(seed=6))).result
    assert result is not None
    made: list[Any] = []
    make = running.make
    monkeypatch.setattr("unicp.cli.jobs.make", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1])
    assert cli.main([*shlex.split(result.request.command())[1:], "-o", str(tmp_path / "out.mp4")]) == 0
    assert np.array_equal(made[-1].frames, result.made.frames)


def test_the_unaccelerated_video_is_made_once(workshop: Workshop, ask: Callable[..., Request]) -> None:
    one = finished(workshop.submit(ask(seed=7))).result
    two = finished(workshop.submit(ask(seed=7, config=unicp.ScheduleConfig(interval=4)))).result
    three = finished(workshop.submit(ask(seed=8))).result
    assert one is not None and two is not None and three is not None
    assert (one.kept, two.kept, three.kept) == (False, True, False)
    assert two.plain is one.plain


def test_a_cancelled_job_stops_and_the_next_is_right(workshop: Workshop, ask: Callable[..., Request]) -> None:
    right = finished(workshop.submit(ask(seed=9))).result
    assert right is not None
    long = workshop.submit(ask(seed=9, options={"--steps": 900}))
    behind = workshop.submit(ask(seed=10))
    until = time.monotonic() + 60
    while long.steps < 3:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert workshop.ahead(behind) == 1 and "1 video is being made before this one" in views.status(behind, 1)
    behind.cancel()  # before it began
    long.cancel()
    assert finished(long).state == CANCELLED and long.steps < 900
    assert finished(behind).state == CANCELLED and behind.result is None
    again = finished(workshop.submit(ask(seed=9))).result
    assert again is not None and np.array_equal(again.made.frames, right.made.frames)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such folder"}, "there is no model folder"),
        ({"options": {"--size": "50x32"}}, "width 50 is not a multiple of"),
        ({"options": {"--frames": 4}}, "--frames 4 is not 1 more than a multiple"),
        ({"options": {"--size": "large"}}, "--size"),
        ({"config": unicp.BudgetConfig(min_psnr=30)}, "profile"),
    ],
)
def test_an_error_is_a_sentence_and_the_next_job_is_made(
    workshop: Workshop, ask: Callable[..., Request], changes: dict[str, Any], message: str
) -> None:
    job = finished(workshop.submit(ask(**changes)))
    assert job.state == FAILED and message in job.error and "\n" not in job.error
    shown = views.status(job)
    assert shown.startswith('<div class="unicp-error" role="alert">') and shown.endswith(".</div>")
    assert finished(workshop.submit(ask())).state == DONE


def test_what_breaks_on_the_way_is_said_too(
    workshop: Workshop, ask: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr("unicp.studio.workshop.generate", broken)
    job = finished(workshop.submit(ask(seed=11)))
    assert job.error.endswith("Ask for a smaller size, or for fewer frames.")


# --- how it is shown ------------------------------------------------------------------------------------------------


def test_what_a_user_wrote_is_escaped(workshop: Workshop, ask: Callable[..., Request]) -> None:
    evil = "<img src=x onerror=alert(1)>"
    result = finished(workshop.submit(ask(prompt=evil, seed=12))).result
    assert result is not None
    assert "<img" not in views.figures(result) + views.decisions(result)
    assert "<img" not in views.failure(f"there is no model {evil}")


def test_every_step_has_a_cell(workshop: Workshop, ask: Callable[..., Request]) -> None:
    result = finished(workshop.submit(ask(seed=13, config=unicp.AdaCacheConfig()))).result
    assert result is not None and result.made.report is not None
    picture = views.decisions(result)
    assert picture.count("<rect") == len(result.made.report.steps) == 16
    assert "change" in picture and "measured change since the last computed step" in picture


# --- what it needs --------------------------------------------------------------------------------------------------


def test_without_gradio_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UnicpError, match=r"pip install 'unicp\[studio\]'"):
        server.check()
    assert cli.main(["studio", "--no-browser"]) == 2
    assert "unicp[studio]" in capsys.readouterr().err


def test_gradio_is_loaded_for_nothing_else() -> None:
    code = (
        "import sys, unicp.cli, unicp.cli.studio, unicp.studio.workshop, unicp.studio.server; "
        "sys.exit('gradio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
