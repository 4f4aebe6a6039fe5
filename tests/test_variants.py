"""Diffusion forcing, where a round of the pipeline is no step of the scheduler, and videos that begin in the middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unicp
from tests.contract import actions, case, quietly
from tests.tiny import FAMILIES
from unicp.bench import harness

FORCING = FAMILIES["skyreels-forcing"]
NAMES = ("adacache-residual", "adacache-forecast", "schedule-linear", "budget-default", "unicp-online")


def _forced(**more: Any) -> tuple[Any, Any]:
    """A pipeline whose three frames fall one after another, and a way to run it."""
    pipe = FORCING.build()

    def run(**request: Any) -> torch.Tensor:
        made: torch.Tensor = FORCING.run(
            pipe,
            lambda each, **call: each(**call, ar_step=2, **more).frames,
            generator=torch.Generator().manual_seed(0),
            **request,
        )
        return made

    return pipe, run


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_fall_one_after_another(name: str) -> None:
    """Ten steps a frame, each frame two rounds behind the one before it: 14 rounds, and one video."""
    pipe, run = _forced()
    plain = run()
    session = unicp.accelerate(pipe, case(name).config)
    first, second = run(), run()
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    assert len(session.reports) == 2
    report = session.reports[0]
    assert actions(report) == actions(session.reports[1])
    assert report.count == 14
    for branch in FORCING.branches:
        mine = [record for record in report.steps if record.branch == branch]
        assert [record.index for record in mine] == list(range(14))
        sigmas = [record.sigma for record in mine]
        assert sigmas == sorted(sigmas, reverse=True)
        assert len(set(sigmas)) == 14
    if name == "schedule-linear":  # until the last round, not until the scheduler's last step
        assert "forecast" in {record.action for record in report.steps if record.index > 10}
    assert not session.cached_tensors()
    session.restore()
    assert torch.equal(run(), plain)
    unicp.accelerate(pipe, case(name).always_compute)
    assert torch.equal(quietly(run), plain)


def test_the_rounds_are_told_without_a_pipeline() -> None:
    pipe, run = _forced()
    plain = run()
    session = unicp.accelerate(pipe.transformer, case("schedule-linear").config)
    assert not torch.equal(run(), plain)
    assert [r.index for r in session.report().steps if r.branch == "cond"] == list(range(14))
    assert torch.equal(run(), run())


def test_a_long_video_is_a_report_for_each_stretch() -> None:
    """Five frames in stretches of three that overlap by one: the noise goes up again at the second."""
    pipe = FORCING.build()

    def run(frames: int = 17) -> torch.Tensor:
        made: torch.Tensor = FORCING.run(
            pipe,
            lambda each, **call: each(**call, overlap_history=1, base_num_frames=9).frames,
            frames=frames,
            generator=torch.Generator().manual_seed(0),
        )
        return made

    plain = run()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    first = run()
    assert first.shape == plain.shape and not torch.equal(first, plain)
    assert len(session.reports) == 2
    assert all(report.count == 10 and len(report.steps) == 20 for report in session.reports)
    assert torch.equal(run(), first)
    unicp.accelerate(pipe, case("adacache-residual").always_compute)
    assert torch.equal(quietly(run), plain)


def test_a_video_that_begins_in_the_middle() -> None:
    """Half the noise is half the steps: their indices, noise levels and number are those of the whole run."""
    chosen = FAMILIES["wan-video"]
    pipe = chosen.build()

    def run() -> torch.Tensor:
        made: torch.Tensor = chosen.run(
            pipe,
            lambda each, **call: each(**{**call, "strength": 0.6}).frames,
            generator=torch.Generator().manual_seed(0),
        )
        return made

    plain = run()
    session = unicp.accelerate(pipe, case("schedule-linear").config)
    first = run()
    report = session.report()
    assert [r.index for r in report.steps] == [i for i in range(4, 10) for _ in chosen.branches]
    assert report.complete and {r.action for r in report.steps} == {"compute", "forecast"}
    assert torch.equal(run(), first) and not torch.equal(first, plain)
    session.restore()
    assert torch.equal(run(), plain)


@pytest.mark.parametrize(("name", "more"), [("wan-video", {"strength": 0.5}), ("skyreels-forcing", {"ar_step": 2})])
def test_a_loop_with_other_steps_than_its_scheduler_is_timed_to_its_end(name: str, more: dict[str, Any]) -> None:
    """Of a video that is begun in the middle there are fewer, of frames that fall one after another there are more."""
    chosen = FAMILIES[name]

    def timed(pipe: Any, output_type: str, **call: Any) -> None:
        seen: list[tuple[int, int]] = []
        output, made = harness.run(
            pipe,
            {**call, **more},
            generator=torch.Generator().manual_seed(0),
            on_step=lambda _, done, total: seen.append((done, total)),
            output_type=output_type,
        )
        assert made.steps != len(pipe.scheduler.timesteps)
        assert seen == [(n + 1, made.steps) for n in range(made.steps)]
        assert made.loop_seconds < made.total_seconds
        assert made.latents is not None and torch.equal(made.latents, torch.as_tensor(output))

    chosen.run(chosen.build(), timed)
