"""The loops in docs/own-loop.md, run as they stand there."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.stand_ins import STDiT3
from tests.test_run import blocks_of
from tests.tiny import wan_transformer
from unicp import BudgetConfig, Run, ScheduleConfig, UnicpError

ONE, TWO = BudgetConfig(target_speedup=1), BudgetConfig(target_speedup=2)


def named(place: int, name: str) -> Any:
    """What a block of the page defines."""
    namespace: dict[str, Any] = {}
    exec(blocks_of("own-loop.md")[place], namespace)
    return namespace[name]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("shape", [(), (4,), (1, 3), (2, 3, 4)])
def test_an_output_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    run = Run(TWO, sigmas=[1 - i / 12 for i in range(12)])
    made = [run.step(i, "cond", lambda i=i: (1 + i) * torch.ones(shape)) for i in range(12)]
    assert all(torch.isfinite(one).all() and one.shape == shape for one in made)
    assert run.report().computed_steps == 6


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(UnicpError, match="output must hold a tensor, got NoneType"):
        Run(TWO, sigmas=[1 - i / 12 for i in range(12)]).step(0, "cond", lambda: None)


# --- k-diffusion ----------------------------------------------------------------------------------------------------


class Clean(torch.nn.Module):
    """A denoiser as k-diffusion's samplers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.calls = wan_transformer(), 0
        self.words = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x - sigma[0] * self.transformer(x, 1000 * sigma, self.words).sample


def euler(model: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for here, there in pairwise(sigmas):
        x = x + (there - here) * (x - model(x, here.expand(len(x)))) / here
    return x


def heun(model: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    for here, there in pairwise(sigmas):
        first = (x - model(x, here.expand(len(x)))) / here
        guess = x + (there - here) * first
        if there > 0:
            second = (guess - model(guess, there.expand(len(x)))) / there
            guess = x + (there - here) * (first + second) / 2
        x = guess
    return x


def dpmpp_2m(model: Any, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    before: torch.Tensor | None = None
    for i, (here, there) in enumerate(pairwise(sigmas)):
        clean = model(x, here.expand(len(x)))
        mixed = clean
        if before is not None and there > 0:
            ratio = math.log(sigmas[i - 1] / here) / math.log(here / there)
            mixed = clean + (clean - before) / (2 * ratio)
        x = there / here * x + (1 - there / here) * mixed
        before = clean
    return x


SIGMAS = torch.tensor([3 * s / (1 + 2 * s) for s in (1 - i / 20 for i in range(21))])


@pytest.mark.parametrize("sampler", [euler, heun, dpmpp_2m])
def test_samplers_of_k_diffusion(sampler: Any) -> None:
    filled, model = named(1, "Filled"), Clean()
    noise = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, whole = sampler(model, noise, SIGMAS), model.calls
    assert torch.equal(sampler(filled(model, SIGMAS, ONE), noise, SIGMAS), plain)
    model.calls = 0
    wrapped = filled(model, SIGMAS, TWO)
    made = sampler(wrapped, noise, SIGMAS)
    assert wrapped.run.report().computed_steps == 10
    assert model.calls == whole - 10  # Heun's second look at a level is computed
    assert 0 < distance(made, plain) < 0.05
    assert torch.equal(sampler(filled(model, SIGMAS, TWO), noise, SIGMAS), made)


# --- Open-Sora ------------------------------------------------------------------------------------------------------


class OpenSora(torch.nn.Module):
    """It predicts a variance beside the velocity."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.calls = STDiT3().eval(), 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, **args: Any) -> torch.Tensor:
        self.calls += 1
        return torch.cat([self.model(x, timestep, **args), torch.full_like(x, 9.0)], dim=1)


@torch.no_grad()
def published(model: Any, z: torch.Tensor, args: dict[str, Any], steps: int, guidance: float) -> torch.Tensor:
    """Rectified flow as Open-Sora has it: timesteps of 1000, a step to the next, and from the last one to 0."""
    timesteps = [torch.tensor([1000 * (1 - i / steps)]) for i in range(steps)] + [torch.tensor([0.0])]
    for here, there in pairwise(timesteps):
        predicted = model(torch.cat([z, z]), here.expand(2 * len(z)), **args).chunk(2, dim=1)[0]
        cond, uncond = predicted.chunk(2, dim=0)
        z = z + (uncond + guidance * (cond - uncond)) * ((here - there) / 1000)
    return z


def test_the_published_loop_of_open_sora() -> None:
    sample, model = named(2, "sample_open_sora"), OpenSora()
    z = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    args = {"y": torch.randn(4, 1, 5, 16, generator=torch.Generator().manual_seed(1))}
    plain = published(model, z, args, 30, 7.0)
    same, report = sample(model, z, args, config=ONE)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    assert report.computed_steps == 30
    model.calls = 0
    made, report = sample(model, z, args)
    assert model.calls == report.computed_steps == 15
    assert 0 < distance(made, plain) < 0.05
    assert torch.equal(sample(model, z, args)[0], made)


# --- chunk by chunk -------------------------------------------------------------------------------------------------


class Causal(torch.nn.Module):
    """What it predicts depends on the chunks that are done."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix, self.calls = torch.nn.Conv3d(8, 4, 1), 0

    def keys_of(self, latents: torch.Tensor, prompt: float) -> torch.Tensor:
        return latents.mean(dim=(2, 3, 4), keepdim=True) * prompt

    @torch.no_grad()
    def forward(self, latents: torch.Tensor, sigma: float, prompt: float, keys: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        past = torch.stack([torch.zeros_like(latents[:, :, :1, :1, :1]), *keys]).sum(dim=0).expand_as(latents)
        return torch.tanh(self.mix(torch.cat([latents, past], dim=1))) * (1 + sigma)


@torch.no_grad()
def test_chunk_by_chunk() -> None:
    sample, model = named(3, "sample_chunks"), Causal()
    chunks = list(torch.randn(3, 1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    sigmas = [1 - i / 16 for i in range(17)]
    plain, _ = sample(model, chunks, sigmas, 0.5, config=ONE)
    model.calls = 0
    made, reports = sample(model, chunks, sigmas, 0.5)
    assert model.calls == 3 * 8 and [report.computed_steps for report in reports] == [8, 8, 8]
    assert all(0 < distance(one, other) < 0.05 for one, other in zip(made, plain, strict=True))
    # The last chunk alone, with the keys of the others: nothing else of them was in it.
    keys = [model.keys_of(latents, 0.5) for latents in made[:2]]

    class Begun(Causal):
        def forward(self, latents: Any, sigma: float, prompt: float, keys: Any, begun: Any = keys) -> Any:
            return model(latents, sigma, prompt, [*begun, *keys])

    (alone,), _ = sample(Begun(), chunks[2:], sigmas, 0.5)
    assert torch.equal(alone, made[2])


def test_a_run_is_not_carried_over_to_the_next_chunk() -> None:
    from unicp import Run

    run = Run(ScheduleConfig(interval=2), [1.0, 0.5])
    for i in range(2):
        run.step(i, "cond", lambda: torch.ones(1))
    with pytest.raises(UnicpError, match="step 0 is over; a Run is one video"):
        run.step(0, "cond", lambda: torch.ones(1))


def test_accelerate_leaves_a_model_alone_that_is_given_a_cache() -> None:
    import unicp

    class Keeps(torch.nn.Module):
        def forward(self, hidden_states: Any, timestep: Any, kv_cache: Any = None) -> Any:
            return hidden_states * 0.5

    model = Keeps().eval()
    unicp.accelerate(model, ScheduleConfig(interval=2))
    with torch.no_grad(), pytest.warns(unicp.UnicpWarning, match="called with a cache of keys"):
        for t in (900.0, 600.0, 300.0):
            model(torch.full((1, 2), t), timestep=torch.tensor([t]), kv_cache=[1])
