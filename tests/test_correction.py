"""Computed steps make good what the forecasts before them were off by: exactly, where the polynomial is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import unicp
from tests.contract import plain, quietly
from tests.tiny import FAMILIES
from unicp import AdaCacheConfig, BudgetConfig
from unicp.engine.clock import Clock
from unicp.engine.kept import BranchCache
from unicp.engine.replay import Player
from unicp.policies import Plan

WAN = FAMILIES["wan"]
SIGMAS = [1.0, 0.9, 0.75, 0.6, 0.5, 0.3, 0.2]
WEIGHTS = [-0.1, -0.2, -0.05, -0.3, -0.1, -0.2, -0.15]  # not the differences of the sigmas


def curve(sigma: float, degree: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    factors = torch.randn(degree + 1, 5, generator=generator, dtype=torch.float64)
    return sum(f * sigma**power for power, f in enumerate(factors))  # type: ignore[return-value]


def given_to_the_solver(degree: int, order: int, compute: tuple[int, ...], correct: bool = True) -> torch.Tensor:
    """What the solver has been given by the end: the weighted sum over all steps."""
    cache, total = BranchCache(), torch.zeros(5, dtype=torch.float64)
    for step, (sigma, weight) in enumerate(zip(SIGMAS, WEIGHTS, strict=True)):
        if step in compute:
            output = curve(sigma, degree)
            made = cache.corrected(sigma, weight, (output,))[0] if correct else output
            assert torch.equal(output, curve(sigma, degree))
            cache.keep_output(sigma, (output,), 2)
        else:
            plan = Plan(action="forecast" if order else "reuse", order=order, damping=0.85)
            made = cache.filled_output(sigma, plan, weight if correct else None)[0][0]
        total += weight * made
    return total


@pytest.mark.parametrize("compute", [(0, 1, 5, 6), (0, 1, 3, 6), (0, 1, 2, 4, 6)])
def test_what_was_skipped_is_made_good_exactly_up_to_the_second_degree(compute: tuple[int, ...]) -> None:
    wanted = sum(w * curve(s, 2) for s, w in zip(SIGMAS, WEIGHTS, strict=True))
    torch.testing.assert_close(given_to_the_solver(2, 1, compute), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given_to_the_solver(2, 0, compute), wanted, rtol=1e-9, atol=1e-9)
    off = given_to_the_solver(2, 1, compute, correct=False) - wanted
    assert float(off.norm()) > 0.01


def test_on_rougher_series_little_is_left() -> None:
    wanted = sum(w * curve(s, 4) for s, w in zip(SIGMAS, WEIGHTS, strict=True))
    compute = (0, 1, 3, 5, 6)
    left, plain_ = (float((given_to_the_solver(4, 1, compute, c) - wanted).norm()) for c in (True, False))
    assert left < plain_ / 3


def test_a_step_that_weighs_next_to_nothing_carries_no_correction() -> None:
    cache = BranchCache()
    for step in (0, 1):
        cache.keep_output(SIGMAS[step], (curve(SIGMAS[step], 2),), 2)
    cache.filled_output(SIGMAS[2], Plan(action="forecast", order=1), -0.3)
    output = (curve(SIGMAS[3], 2),)
    assert cache.corrected(SIGMAS[3], -0.001, output) is output
    assert cache.corrected(SIGMAS[3], -0.3, output) is output  # what was not made good then is not made good later
    cache.filled_output(SIGMAS[2], Plan(action="forecast", order=1), -0.3)
    assert cache.corrected(SIGMAS[3], None, output) is output


def test_the_clock_knows_the_weights_that_the_run_will_show() -> None:
    def check(pipe: Any, **call: Any) -> None:
        clock = Clock.of(pipe, None, weigh=True)
        seen: list[Any] = []

        def look(_: Any, __: Any, kwargs: Any) -> None:
            seen.append(clock.tick(None, kwargs).step.weights)

        handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
        take = Player(pipe, {"transformer": pipe.transformer}).run(
            {**call, "generator": torch.Generator().manual_seed(0)}, record=True
        )
        handle.remove()
        assert take.weights is not None
        assert all(weights == pytest.approx(take.weights, rel=1e-5) for weights in seen)

    WAN.run(WAN.build(), check)


@pytest.mark.parametrize("family", ["wan", "ltx", "cogvideox", "mochi"])
def test_on_real_pipelines_corrected_forecasts_end_nearer(family: str) -> None:
    chosen = FAMILIES[family]
    off = {}
    for correct in (True, False):
        pipe = chosen.build()
        unicp.accelerate(pipe, BudgetConfig(target_speedup=2, leap=0, override_reserve=0, correct=correct))
        latents = quietly(lambda pipe=pipe: chosen.generate(pipe))
        off[correct] = float((latents - plain(family)).norm())
    assert off[True] < off[False]


def test_adacache_corrects_its_forecasts_and_never_the_papers_fill() -> None:
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
