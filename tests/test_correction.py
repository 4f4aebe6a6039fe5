"""Computed steps make good what the forecasts before them were off by: exactly, where the polynomial is exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import unicp
from tests.contract import plain, quietly
from tests.tiny import FAMILIES
from unicp import AdaCacheConfig, BudgetConfig
from unicp.engine.clock import Clock
from unicp.engine.fills.kept import Kept
from unicp.engine.fills.output import OutputFill
from unicp.engine.solver.response import Solver
from unicp.policies import Decision, Needs, Step
from unicp.tensors import extrapolation

WAN = FAMILIES["wan"]
SIGMAS = [1.0, 0.9, 0.75, 0.6, 0.5, 0.3, 0.2]
WEIGHTS = [-0.1, -0.2, -0.05, -0.3, -0.1, -0.2, -0.15]  # not the differences of the sigmas


def curve(sigma: float, degree: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    factors = torch.randn(degree + 1, 5, generator=generator, dtype=torch.float64)
    return sum(f * sigma**power for power, f in enumerate(factors))  # type: ignore[return-value]


def steps() -> list[Step]:
    return [
        Step(index=i, count=7, position=i, sigma=sigma, sigmas=tuple(SIGMAS), weights=tuple(WEIGHTS))
        for i, sigma in enumerate(SIGMAS)
    ]


def given_to_the_solver(degree: int, order: int, compute: tuple[int, ...], correct: bool = True) -> torch.Tensor:
    """What the solver has been given by the end: the weighted sum over all steps."""
    needs = Needs(keep="output", order=2, correct=correct, steadiness=correct)
    fill, total = OutputFill(needs), torch.zeros(5, dtype=torch.float64)
    for step in steps():
        if step.index in compute:
            output = curve(step.sigma, degree)
            made = fill.keep(step, (output,))[0]
            assert torch.equal(output, curve(step.sigma, degree))
        else:
            decided = Decision(action="forecast" if order else "reuse", order=order, damping=0.85)
            made = fill.fill(step, decided, step.weight if correct else None)[0]
        total += WEIGHTS[step.index] * made
    return total


@pytest.fixture
def in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corrections in full, and forecasts, whatever the steps and the outputs."""
    monkeypatch.setattr(extrapolation, "firmness", lambda *_: 1.0)
    monkeypatch.setattr(extrapolation, "steadiness", lambda *_: torch.ones(1, dtype=torch.float64))
    monkeypatch.setattr(Kept, "_share", lambda *_: torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("compute", [(0, 1, 5, 6), (0, 1, 3, 6), (0, 1, 2, 4, 6)])
def test_what_was_skipped_is_made_good_exactly_up_to_the_second_degree(compute: tuple[int, ...], in_full: None) -> None:
    wanted = sum(w * curve(s, 2) for s, w in zip(SIGMAS, WEIGHTS, strict=True))
    torch.testing.assert_close(given_to_the_solver(2, 1, compute), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given_to_the_solver(2, 0, compute), wanted, rtol=1e-9, atol=1e-9)
    off = given_to_the_solver(2, 1, compute, correct=False) - wanted
    assert float(off.norm()) > 0.01


def test_on_rougher_series_little_is_left(in_full: None) -> None:
    wanted = sum(w * curve(s, 4) for s, w in zip(SIGMAS, WEIGHTS, strict=True))
    compute = (0, 1, 3, 5, 6)
    left, plain_ = (float((given_to_the_solver(4, 1, compute, c) - wanted).norm()) for c in (True, False))
    assert left < plain_ / 3


@pytest.mark.parametrize("compute", [(0, 1, 2, 4, 6), (0, 1, 2, 5, 6)])
def test_a_share_of_the_correction_is_that_share_of_it(compute: tuple[int, ...], monkeypatch: Any) -> None:
    """What is left is linear in the share, also where forecasts are believed by half."""
    monkeypatch.setattr(extrapolation, "steadiness", lambda *_: torch.full((1,), 0.5, dtype=torch.float64))
    ends = []
    for firm in (0.0, 0.5, 1.0):
        monkeypatch.setattr(extrapolation, "firmness", lambda *_, firm=firm: 2 * firm)
        ends.append(given_to_the_solver(2, 1, compute))
    wanted = sum(w * curve(s, 2) for s, w in zip(SIGMAS, WEIGHTS, strict=True))
    torch.testing.assert_close(ends[2], wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2, rtol=1e-9, atol=1e-9)
    assert float((ends[0] - wanted).norm()) > 0.01


def test_a_step_that_weighs_next_to_nothing_carries_no_correction() -> None:
    fill = OutputFill(Needs(keep="output", order=2, correct=True, steadiness=True))
    known = steps()
    for step in known[:2]:
        fill.keep(step, (curve(step.sigma, 2),))
    forecast, output = Decision(action="forecast", order=1), (curve(SIGMAS[3], 2),)
    fill.fill(known[2], forecast, -0.3)
    light = dataclasses.replace(known[3], weights=(*WEIGHTS[:3], -0.001, *WEIGHTS[4:]))
    assert fill.keep(light, output) is output
    del fill.kept.values[0], fill.kept.sigmas[0]
    assert fill.keep(known[3], output) is output  # what was not made good then is not made good later
    fill.fill(known[4], forecast, -0.3)
    assert fill.keep(dataclasses.replace(known[5], weights=None), output) is output


def test_the_clock_knows_the_weights_that_the_run_will_show() -> None:
    def check(pipe: Any, **call: Any) -> None:
        clock = Clock.of(pipe, None, weigh=True)
        seen: list[Any] = []

        def look(_: Any, __: Any, kwargs: Any) -> None:
            seen.append(clock.tick(None, kwargs).step.weights)

        handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
        own = pipe.scheduler.step
        solver: list[Solver] = []

        def step(*args: Any, **kwargs: Any) -> Any:
            solver[:] = solver or [Solver(pipe.scheduler, own)]
            solver[0].called(*args, **kwargs)
            return own(*args, **kwargs)

        pipe.scheduler.step = step
        pipe(**call, generator=torch.Generator().manual_seed(0))
        handle.remove()
        shown = solver[0].response()
        assert shown is not None
        assert all(weights == pytest.approx(shown, rel=1e-5) for weights in seen)

    WAN.run(WAN.build(), check)


@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox", "mochi"])
def test_on_real_pipelines_corrected_forecasts_end_no_further_off(family: str) -> None:
    chosen = FAMILIES[family]
    off = {}
    for correct in (True, False):
        pipe = chosen.build()
        unicp.accelerate(pipe, BudgetConfig(target_speedup=2, leap=0, override_reserve=0, correct=correct))
        latents = quietly(lambda pipe=pipe: chosen.generate(pipe))
        off[correct] = float((latents - plain(family)).norm())
    assert off[True] <= 1.03 * off[False]  # these models are random: their outputs hardly go on as they went


def test_adacache_corrects_its_forecasts_and_never_the_papers_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    # Outputs of a random model turn off at every step, which by itself corrects nothing.
    monkeypatch.setattr(extrapolation, "steadiness", lambda new, *_: torch.ones(len(new), *(1,) * (new.ndim - 1)))
    ends = []
    for config in (AdaCacheConfig(fill="forecast"), AdaCacheConfig(fill="forecast", correct=False)):
        pipe = WAN.build()
        unicp.accelerate(pipe, config.replace(codebook=((1e9, 3),)))
        ends.append(quietly(lambda pipe=pipe: WAN.generate(pipe)))
    assert not torch.equal(*ends)
    pipes = []
    for correct in (True, False):
        pipe = WAN.build()
        unicp.accelerate(pipe, AdaCacheConfig(codebook=((1e9, 3),), correct=correct))
        pipes.append(quietly(lambda pipe=pipe: WAN.generate(pipe)))
    assert torch.equal(*pipes)
