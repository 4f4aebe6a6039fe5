"""Which step of which video a call is: by the scheduler's index and the timesteps' own tensor, and said if unknown."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES, wan_transformer
from unicp.engine.clock import Clock, Grid
from unicp.errors import UnicpWarning
from unicp.tensors.host import Point

BUDGET = unicp.BudgetConfig(target_speedup=2)
EMBEDS = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def line(report: unicp.SessionReport) -> str:
    return next(iter(report.timeline().values()))


# --- points and grids -------------------------------------------------------------------------------------------------


def test_a_timestep_tells_where_it_comes_from() -> None:
    times = torch.linspace(1000, 20, 12)
    for i, t in enumerate(times):
        for shown in (t, t[None], t.expand(2), t.expand(2, 6), times[i : i + 1]):
            point = Point.of(shown)
            assert point is not None and (point.offset, point.count) == (i, 12)
            grid = Grid.around(shown, point)
            assert grid is not None and grid.levels == tuple(times.tolist())


@pytest.mark.parametrize(
    "timestep",
    [5, torch.tensor(5.0), torch.tensor([5.0, 5.0]), torch.linspace(9, 1, 9)[2].to(torch.bfloat16), torch.ones(0)],
)
def test_a_timestep_of_its_own_tells_nothing(timestep: Any) -> None:
    assert Point.of(timestep) is None


@pytest.mark.parametrize("values", [[900.0, 100.0, 500.0], [7.0, 7.0, 7.0]])
def test_what_neither_falls_nor_rises_is_no_run(values: list[float]) -> None:
    timestep = torch.tensor(values)[1:2]
    point = Point.of(timestep)
    assert point is not None and Grid.around(timestep, point) is None


def test_a_grid_is_known_in_inference_mode_too() -> None:
    with torch.inference_mode():
        timestep = torch.linspace(1000, 20, 12)[3].expand(1)
        point = Point.of(timestep)
        assert point is not None and Grid.around(timestep, point) is not None


def test_timesteps_written_anew_in_place_are_another_run() -> None:
    """As a server with static buffers does."""
    clock, times = Clock(), torch.linspace(1000, 100, 10)
    hidden = torch.zeros(1, 4)
    ticks = [clock.tick("cond", {"hidden_states": hidden, "timestep": t[None]}) for t in times[:4]]
    times.copy_(torch.linspace(900, 50, 10))
    again = clock.tick("cond", {"hidden_states": hidden, "timestep": times[4][None]})
    assert not any(tick.new_generation for tick in ticks[1:]) and again.new_generation
    assert again.step.sigmas is not None and again.step.sigmas[0] == pytest.approx(0.9)


# --- where nobody names the scheduler ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "asked"), [(20, 2), (30, 3), (100, 2)])
def test_the_transformer_alone_gets_the_speed_that_is_asked_for(steps: int, asked: int) -> None:
    family = FAMILIES["ltx"]
    pipe = family.build()
    session = unicp.accelerate(pipe.transformer, unicp.BudgetConfig(target_speedup=asked))
    family.generate(pipe, steps=steps)
    report = session.report()
    assert report.count == steps and report.estimated_speedup == pytest.approx(asked, rel=0.05)
    assert report.steps[-1].action == "compute" and report.complete


def sampled(model: Any, shown: Any, steps: int = 12, seed: int = 0) -> torch.Tensor:
    """A loop of one's own, with timesteps as ``shown`` makes them of the scheduler's."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for t in scheduler.timesteps:
            with model.cache_context("cond"):
                v = model(hidden_states=x, timestep=shown(t), encoder_hidden_states=EMBEDS, return_dict=False)[0]
            x = scheduler.step(v, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("config", [BUDGET, unicp.AdaCacheConfig(codebook=((1e9, 3),))], ids=lambda c: c.method)
def test_an_unknown_number_of_steps_is_said(config: Any) -> None:
    """A timestep that was made anew tells nothing but itself."""
    model = wan_transformer()
    plain = sampled(model, lambda t: torch.tensor([float(t)]))
    session = unicp.accelerate(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicpWarning)
        out = sampled(model, lambda t: torch.tensor([float(t)]))
        report = session.report()
    (note,) = (note for note in report.notes if "how many steps" in note)
    assert "num_inference_steps" in note
    if config is BUDGET:  # no plan without it
        assert torch.equal(out, plain) and report.estimated_speedup == 1
    else:
        assert report.estimated_speedup > 1.5


def steps_of(model: Any, timesteps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Euler's method over these timesteps, on the bare model."""
    x = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    ends = [*timesteps[1:].tolist(), 0.0]
    with torch.no_grad():
        for t, end in zip(timesteps, ends, strict=True):
            v = model(hidden_states=x, timestep=t.expand(1), encoder_hidden_states=EMBEDS, return_dict=False)[0]
            x = x + (end - float(t)) / 1000 * v
    return x


def test_timesteps_that_a_loop_leaves_out_are_said() -> None:
    """A tensor of more timesteps than are taken tells neither how many steps there are nor which is the last."""
    every = torch.linspace(1000, 25, 40)
    plain = steps_of(wan_transformer(), every[::2])
    model = wan_transformer()
    session = unicp.accelerate(model, BUDGET)
    assert torch.equal(steps_of(model, every[::2]), plain)
    assert any("left out timesteps" in note for note in session.report().notes)
    steps_of(model, every[::2].clone())
    report = session.report()
    assert report.computed_steps == 10 and not any("left out" in note for note in report.notes)


def test_a_video_is_not_filled_from_one_that_broke_off_earlier_in_its_timesteps() -> None:
    """Video to video on a tensor of timesteps that is kept: the other one broke off before the step where it begins."""
    timesteps, config = torch.linspace(1000, 50, 20), unicp.ScheduleConfig(compute=(0, 1), fill="linear")
    model = wan_transformer()
    session = unicp.accelerate(model, config)
    steps_of(model, timesteps[:8], seed=1)
    steps_of(model, timesteps[12:])
    actions = {r.index: r.action for r in session.report().steps}
    assert actions[12] == "compute" and actions[7] == "forecast"
    assert any("broke off" in note for note in session.report().notes)


@pytest.mark.parametrize("before", [None, 10, 30])
def test_a_copy_of_the_pipeline_with_a_scheduler_of_its_own(before: int | None) -> None:
    """As diffusers' server example makes one for each request; the pipeline itself ran before, or did not."""
    family = FAMILIES["ltx"]
    base = family.build()
    session = unicp.accelerate(base, BUDGET)
    if before:
        family.generate(base, steps=before)
    copied = copy.copy(base)
    copied.scheduler = copy.deepcopy(base.scheduler)
    family.generate(copied, steps=30)
    report = session.report()
    assert (report.count, report.complete, report.computed_steps) == (30, True, 15)
    assert report.steps[-1].action == "compute"


def test_a_copy_whose_timesteps_are_not_shown_is_computed_and_said() -> None:
    """The scheduler of the pipeline has run; that of the copy is unknown, and its timesteps are made anew."""
    family = FAMILIES["latte"]
    base, twin = family.build(), family.build()
    for pipe in (base, twin):
        pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "timestep": kwargs["timestep"] + 0}), with_kwargs=True
        )
    plain = family.generate(twin, steps=14)
    session = unicp.accelerate(base, BUDGET)
    quietly(lambda: family.generate(base, steps=10))
    copied = copy.copy(base)
    copied.scheduler = copy.deepcopy(base.scheduler)
    out = quietly(lambda: family.generate(copied, steps=14))
    report = quietly(session.report)
    assert torch.equal(out, plain)
    assert any("how many steps" in note or "pipeline's scheduler" in note for note in report.notes)


# --- timesteps that do not tell the steps apart -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "shift"), [("hunyuan-video", 50, 7.0), ("hunyuan-video-1.5", 50, 9.0), ("cosmos2", 36, None)]
)
def test_half_precision_merges_timesteps_but_no_steps(name: str, steps: int, shift: float | None) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    pipe.transformer.to(torch.bfloat16)
    if shift is not None:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    session = unicp.accelerate(pipe, BUDGET)

    def half(run: Any, **call: Any) -> Any:
        floats = {n: v.bfloat16() for n, v in call.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        return run(**{**call, **floats})

    with torch.autocast("cpu", torch.bfloat16):
        family.run(pipe, half, steps=steps, generator=torch.Generator().manual_seed(0))
    (report,) = session.reports
    branches = {record.branch for record in report.steps}
    assert (report.count, report.complete, len(branches)) == (steps, True, 2)
    for branch in branches:
        assert [r.index for r in report.steps if r.branch == branch] == list(range(steps))
    assert not session.cached_tensors()


@pytest.mark.parametrize("name", ["wan-video", "sana-video"])
def test_a_second_order_scheduler_without_contexts(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.build()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    session = unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))
    family.generate(pipe, steps=10)
    (report,) = session.reports
    visits = len(pipe.scheduler.timesteps)
    first = report.steps[0].index  # video to video begins later
    for branch in {record.branch for record in report.steps}:
        assert [r.index for r in report.steps if r.branch == branch] == list(range(first, visits))
    assert report.complete and report.estimated_speedup < 2.2


def shares(family: Any, share: Any) -> Any:
    pipe = family.build()
    inner = pipe._inputs
    pipe._inputs = lambda x, t, e: inner(x, share(t), e)
    return pipe


@pytest.mark.parametrize("share", [lambda t: t / 1000, lambda t: 1 - t / 1000], ids=["share", "rising"])
def test_timesteps_as_a_share_of_the_schedulers(share: Any) -> None:
    """Many models are given t/1000; Lumina2 one that rises as the noise falls."""
    family = FAMILIES["chronoedit"]
    pipe = shares(family, share)
    session = unicp.accelerate(pipe, BUDGET)
    family.generate(pipe, steps=20)
    (report,) = session.reports
    assert [r.index for r in report.steps if r.branch == "call 1"] == list(range(20))
    assert report.computed_steps == 10 and report.complete


def test_a_timestep_of_another_name() -> None:
    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = torch.nn.Linear(4, 4)

        def forward(self, x: Any, t: Any) -> Any:
            return self.f(x)

    model = Named().eval()
    session = unicp.accelerate(model, BUDGET)
    with torch.no_grad():
        for t in torch.linspace(1000, 50, 20):
            model(torch.zeros(1, 4), t=t)
    report = session.report()
    assert report.count == 20 and report.estimated_speedup == pytest.approx(2, rel=0.05)


def test_a_loop_that_leaves_out_the_last_timestep() -> None:
    from tests.tiny_variants import _ltx

    embeds, mask = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1)), torch.ones(1, 8)
    pipe = _ltx("LTXI2VLongMultiPromptPipeline")
    pipe.encode_prompt = lambda *_, **__: (embeds, mask, -embeds, mask)
    session = unicp.accelerate(pipe, BUDGET)
    pipe(
        prompt="a", height=64, width=64, num_frames=33, num_inference_steps=12, guidance_scale=4.0,
        temporal_tile_size=16, temporal_overlap=8, seed=0, output_type="latent",
    )  # fmt: skip
    for report in session.reports:
        assert (report.count, report.complete) == (11, True)
        assert report.steps[-1].action == "compute"  # no run of fewer steps ends where this loop does


# --- windows ----------------------------------------------------------------------------------------------------------


def windows(model: Any, named: bool, moving: bool, part: Any = lambda x: x) -> torch.Tensor:
    """Windows of 5 frames of a video of 11, one after another at each step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(20)
    x = torch.randn(1, 4, 11, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            total, count = torch.zeros_like(x), torch.zeros(1, 1, 11, 1, 1)
            for a in sorted({0, 6, *range(i % 2, 7, 3)}) if moving else (0, 2, 4, 6):
                call = {"hidden_states": part(x[:, :, a : a + 5]), "timestep": t[None]}
                call |= {"encoder_hidden_states": EMBEDS, "return_dict": False}
                if named:
                    with model.cache_context("cond"):
                        total[:, :, a : a + 5] += model(**call)[0]
                else:
                    total[:, :, a : a + 5] += model(**call)[0]
                count[:, :, a : a + 5] += 1
            x = scheduler.step(total / count, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("moving", [True, False])
def test_windows_are_known_by_their_place(named: bool, moving: bool) -> None:
    model = wan_transformer()
    plain = windows(model, named, moving)
    session = unicp.accelerate(model, unicp.ScheduleConfig(interval=3))
    out = quietly(lambda: windows(model, named, moving))
    (report,) = session.reports
    assert off(out, plain) < 0.04
    skipped = [record for record in report.steps if record.action != "compute"]
    assert skipped and (moving or len(skipped) > len(report.steps) / 2)


@pytest.mark.parametrize("named", [True, False])
def test_windows_that_cannot_be_told_apart_are_computed_and_said(named: bool) -> None:
    model = wan_transformer()
    plain = windows(model, named, True, torch.clone)
    session = unicp.accelerate(model, unicp.ScheduleConfig(interval=3))
    out = quietly(lambda: windows(model, named, True, torch.clone))
    report = quietly(session.report)
    assert torch.equal(out, plain)
    assert any("windows" in note and "cache_context" in note for note in report.notes)


# --- several videos at a time -----------------------------------------------------------------------------------------


def requests(model: Any, order: list[int], same_prompt: bool = False) -> list[torch.Tensor]:
    """Two videos, each with latents, a prompt and a scheduler of its own, a step of one or the other at a time."""
    made: list[list[Any]] = []
    for seed in (0, 1):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(10)
        noise = torch.Generator().manual_seed(seed)
        latents, embeds = torch.randn(1, 4, 3, 4, 4, generator=noise), torch.randn(1, 8, 16, generator=noise)
        made.append([scheduler, latents, EMBEDS if same_prompt else embeds, 0])
    with torch.no_grad():
        for who in order:
            scheduler, x, embeds, i = made[who]
            t = scheduler.timesteps[i]
            with model.cache_context("cond"):
                v = model(hidden_states=x, timestep=t[None], encoder_hidden_states=embeds, return_dict=False)[0]
            made[who][1:] = [scheduler.step(v, t, x, return_dict=False)[0], embeds, i + 1]
    return [video[1] for video in made]


@pytest.mark.parametrize("same_prompt", [False, True])
def test_two_videos_by_turns_do_not_mix(same_prompt: bool) -> None:
    """The second begins in the middle of the first: that one is computed from there on, and the report says so."""
    order = [0] * 4 + [1] * 2 + [0] + [1] * 2 + [0] * 5 + [1] * 6
    model = wan_transformer()
    wanted = requests(model, order, same_prompt)
    session = unicp.accelerate(model, unicp.ScheduleConfig(interval=3))
    apart = requests(model, [0] * 10 + [1] * 10, same_prompt)
    together = requests(model, order, same_prompt)
    assert off(together[0], wanted[0]) <= off(apart[0], wanted[0])
    assert torch.equal(together[1], apart[1])
    assert any("another video" in note for note in session.report().notes)


def test_a_preview_made_in_a_callback() -> None:
    """Another run on the same transformer, from inside of the first one."""
    family = FAMILIES["ltx"]
    pipe, twin = family.build(), family.build()

    def preview(one: Any, session: Any = None) -> Any:
        copied = copy.copy(one)
        copied.scheduler = copy.deepcopy(one.scheduler)
        shown: list[torch.Tensor] = []

        def callback(_: Any, i: int, __: Any, tensors: Any) -> Any:
            if i == 7:
                shown.append(family.generate(copied, steps=6, seed=5))
            return tensors

        return torch.cat([family.generate(one, steps=20, callback=callback), *shown])

    plain = preview(twin)
    unicp.accelerate(pipe, unicp.ScheduleConfig(interval=3))
    out = quietly(lambda: preview(pipe))
    assert off(out[:1], plain[:1]) < 0.05 and off(out[1:], plain[1:]) < 0.1


def test_guidance_switched_off_is_one_video() -> None:
    """diffusers' SDCFGCutoffCallback: from then on the batch is half as large."""
    family = FAMILIES["ltx"]
    pipe = family.build()
    names = ("prompt_embeds", "prompt_attention_mask")
    pipe._callback_tensor_inputs = ["latents", "negative_prompt_embeds", *names]

    def cut(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        if i == 8:
            pipe._guidance_scale = 1.0
            tensors |= {name: tensors[name].chunk(2)[-1] for name in names}
        return tensors

    def video() -> torch.Tensor:
        call = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["latents", *names]}
        out: torch.Tensor = family.run(
            pipe, lambda p, **k: p(**call, **k).frames, steps=20, generator=torch.Generator().manual_seed(0)
        )
        return out

    plain = video()
    session = unicp.accelerate(pipe, BUDGET)
    out = video()
    (report,) = session.reports
    assert report.count == 20 and report.steps[9].action == "compute" and off(out, plain) < 0.03
    assert any("changed in the middle" in note for note in report.notes)
