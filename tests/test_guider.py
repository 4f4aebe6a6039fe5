"""The guider of modular pipelines: it does what ``accelerate`` does, with no hook, around whatever guider is used."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig

import unicp
from tests.contract import counting, quietly, traces
from tests.family import part
from tests.tiny import FAMILIES
from tests.tiny_modular import GUIDED, Flux, assembled
from unicp import BudgetConfig, ScheduleConfig, UnicpError
from unicp.hosts.guider import FillGuider

CONFIGS = {"budget": BudgetConfig(target_speedup=2), "schedule": ScheduleConfig(interval=3, fill="linear")}
SKIP = LayerSkipConfig([1], fqn="transformer_blocks")
GUIDERS: dict[str, Any] = {
    "window": lambda: ClassifierFreeGuidance(guidance_scale=4.0, start=0.3, stop=0.7),
    "late": lambda: ClassifierFreeGuidance(guidance_scale=4.0, start=0.55, guidance_rescale=0.5),
    "zero-star": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=2),
    "projected": lambda: AdaptiveProjectedGuidance(guidance_scale=4.0, adaptive_projected_guidance_momentum=-0.5),
    "skip-layer": lambda: SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_start=0.15, skip_layer_guidance_stop=0.8, skip_layer_config=SKIP
    ),
    "tangential": lambda: TangentialClassifierFreeGuidance(guidance_scale=4.0),
}


def generate(pipe: Any, kind: Any, **more: Any) -> torch.Tensor:
    call = {"num_inference_steps": 10, "height": 64, "width": 64, "num_frames": 9, "output": "latents"}
    seed = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected input")  # an image has no frames
        made: torch.Tensor = pipe(**{**kind.call(), **call, "generator": seed, **more})
    return made


def guiders(pipe: Any) -> dict[str, Any]:
    found = {name: getattr(pipe, name, None) for name in ("guider", "guider_2")}
    return {name: guider for name, guider in found.items() if guider is not None}


def filled(pipe: Any, config: Any) -> Any:
    pipe.update_components(**{name: FillGuider(each, config, pipe) for name, each in guiders(pipe).items()})
    return pipe


def done(*reports: Any) -> list[tuple[Any, ...]]:
    """Decisions; branches by the order in which they are called."""
    rows: list[tuple[Any, ...]] = []
    for report in reports:
        rows += [(r.denoiser, r.index, r.action, r.sigma, r.metric) for r in report.steps]
    return rows


def accelerated(kind: Any, config: Any, guider: Any = None) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """What ``accelerate`` makes of the same pipeline, and what it decided."""
    pipe = kind.build(guider)
    with unicp.accelerate(pipe, config) as session:
        made = quietly(lambda: generate(pipe, kind))
        return made, done(session.report())


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_decides_as_accelerate_does_and_makes_the_same_bits(name: str, config: Any) -> None:
    kind = GUIDED[name]
    wanted, decided = accelerated(kind, config)
    pipe = filled(kind.build(), config)
    before = traces(pipe.transformer)
    made = generate(pipe, kind)
    assert torch.equal(made, wanted)
    assert done(*(each.report() for each in guiders(pipe).values())) == decided
    assert {action for _, _, action, *_ in decided} > {"compute"}
    assert traces(pipe.transformer) == before
    assert torch.equal(generate(pipe, kind), made)
    with counting([pipe.transformer]) as counts:
        generate(pipe, kind)
    assert counts[0] == sum(r.action == "compute" for r in pipe.guider.report().steps)


@pytest.mark.parametrize("name", [*GUIDED])
def test_computing_everything_changes_no_bit(name: str) -> None:
    kind = GUIDED[name]
    plain = generate(kind.build(), kind)
    assert torch.equal(generate(filled(kind.build(), BudgetConfig(target_speedup=1)), kind), plain)


@pytest.mark.parametrize("leap", [0.6, 0.0])
def test_it_makes_the_ordinary_pipelines_video(leap: float) -> None:
    """Where noise levels are those of the run: from 25 steps on the default plan leaps to no other ones."""
    config, family = BudgetConfig(target_speedup=2, leap=leap), FAMILIES["wan"]
    ordinary = family.build()
    with unicp.accelerate(ordinary, config) as session:
        wanted = family.generate(ordinary, steps=26)
        report = session.report()
    part("WanModularPipeline")
    pipe = assembled(
        "wan.modular_blocks_wan",
        "WanCoreDenoiseStep",
        transformer=ordinary.transformer,
        scheduler=ordinary.scheduler,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    embeds = [torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))[None] for seed in (1, 101)]
    made = filled(pipe, config)(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        latents=torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        num_inference_steps=26,
        num_frames=9,
        height=32,
        width=32,
        output="latents",
    )
    assert done(pipe.guider.report()) == done(report)
    assert ("leap" in {r.action for r in report.steps}) == (leap > 0)
    assert torch.equal(made, wanted)


@pytest.mark.slow
def test_the_demo_model_makes_the_ordinary_pipelines_video() -> None:
    from benchmarks.modular import modular, noise

    config, size = BudgetConfig(target_speedup=2), {"height": 96, "width": 96, "num_frames": 13}
    ordinary = WanPipeline.from_pretrained(unicp.demo.path(), dtype=torch.float32)
    pipe = filled(modular(ordinary), config)
    words, steps = "a red ball bouncing fast over a gray striped background", 26
    made = pipe(prompt=words, latents=noise(ordinary, 0), num_inference_steps=steps, output="latents", **size)
    with unicp.accelerate(ordinary, config) as session:
        seed = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent", **size}
        wanted = ordinary(words, generator=seed, **call).frames
        assert done(pipe.guider.report()) == done(session.report())
    assert torch.equal(made, wanted)


def test_it_plays_a_profile() -> None:
    family, kind = FAMILIES["ltx"], GUIDED["ltx"]
    profile = family.run(
        family.build(),
        lambda run, **call: unicp.tune(run, None, effort="low", target_speedup=2, progress=False, **call),
    )
    config = BudgetConfig(profile=profile, target_speedup=1.4)
    wanted, decided = accelerated(kind, config)
    pipe = filled(kind.build(), config)
    assert torch.equal(generate(pipe, kind), wanted)
    assert done(pipe.guider.report()) == decided and {action for _, _, action, *_ in decided} > {"compute"}
    with pytest.raises(UnicpError, match="FillGuider has to know the model: give it the pipeline, pipe=pipe"):
        FillGuider(pipe.guider, config)
    other = filled(GUIDED["wan"].build(), config)
    with pytest.raises(UnicpError, match="the profile"):
        generate(other, GUIDED["wan"])


# --- whatever guider is used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guider", [pytest.param(name, marks=pytest.mark.slow if place % 2 else ()) for place, name in enumerate(GUIDERS)]
)
def test_the_users_guider_goes_on_as_it_is(guider: str) -> None:
    kind = GUIDED["ltx"]
    plain = generate(kind.build(GUIDERS[guider]()), kind)
    assert torch.equal(generate(filled(kind.build(GUIDERS[guider]()), BudgetConfig(target_speedup=1)), kind), plain)
    config = CONFIGS["budget"]
    wanted, decided = accelerated(kind, config, GUIDERS[guider]())
    pipe = filled(kind.build(GUIDERS[guider]()), config)
    made = generate(pipe, kind)
    report = pipe.guider.report()
    assert done(report) == decided
    assert torch.equal(made, wanted) and not torch.equal(made, plain)
    first = {branch: next(r for r in report.steps if r.branch == branch) for branch in report.timeline()}
    assert {record.action for record in first.values()} == {"compute"}, "filled from nothing"
    assert torch.equal(generate(pipe, kind), made)


def test_a_condition_that_comes_again_is_not_filled_from_what_is_long_ago() -> None:
    class Flickering(ClassifierFreeGuidance):
        def _is_cfg_enabled(self) -> bool:
            return self._step not in (4, 5)

    kind = GUIDED["hunyuan-video-1.5"]
    pipe = filled(kind.build(Flickering(guidance_scale=4.0)), ScheduleConfig(compute=(0, 1), fill="linear"))
    generate(pipe, kind)
    assert pipe.guider.report().timeline() == {"pred_cond": "##~~~~~~~~", "pred_uncond": "##~~#..."}


@pytest.mark.parametrize("way", ["accelerate", "guider", "guider without its pipeline"])
@pytest.mark.parametrize("what", ["weights", "prompt"])
def test_what_changes_in_the_middle_of_a_run(what: str, way: str) -> None:
    kind, config = GUIDED["wan"], ScheduleConfig(compute=(0, 1), fill="linear")
    pipe = kind.build()
    if way != "accelerate":
        pipe.update_components(guider=FillGuider(pipe.guider, config, pipe if way == "guider" else None))
        report = pipe.guider.report
    else:
        report = unicp.accelerate(pipe, config).report
    own, taken = pipe.scheduler.step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        if len(taken) == 5:
            with torch.no_grad():
                for each in pipe.transformer.parameters() if what == "weights" else embeds:
                    each.mul_(0.9)
        taken.append(1)
        return own(*args, **kwargs)

    embeds: list[torch.Tensor] = []
    prepare = type(pipe.guider).prepare_inputs_from_block_state

    def prepared(data: Any, fields: Any) -> Any:
        embeds[:] = [data.prompt_embeds]
        return prepare(pipe.guider, data, fields)

    pipe.guider.__dict__["prepare_inputs_from_block_state"] = prepared
    pipe.scheduler.step = step
    generate(pipe, kind)
    cond, uncond = report().timeline().values()
    assert cond == "##~~~~#..."
    assert uncond == ("##~~~~#..." if what == "weights" else "##~~~~~~~~")
    assert any("changed in the middle of a run" in note for note in report().notes)


def test_everything_else_about_it_is_the_users_guider() -> None:
    kind = GUIDED["wan"]
    pipe = kind.build()
    own = pipe.guider
    guider = filled(pipe, CONFIGS["budget"]).guider
    assert guider.guider is own and guider.guidance_scale == 4.0 and guider.num_conditions == 2
    assert pipe.requires_unconditional_embeds
    guider.disable()
    assert not own._enabled and guider.num_conditions == 1 and not pipe.requires_unconditional_embeds
    guider.enable()
    guider.guidance_scale = 3.0
    assert own.guidance_scale == 3.0
    assert type(guider.new(guidance_scale=2.0)) is ClassifierFreeGuidance and guider.config == own.config
    assert FillGuider(guider, CONFIGS["schedule"], pipe).guider is own
    assert "guidance_scale" in repr(guider)
    generate(pipe, kind)
    assert guider.num_conditions == 2
    pipe.update_components(guider=guider.guider)
    own.guidance_scale = 4.0
    assert torch.equal(generate(pipe, kind), generate(kind.build(), kind))


def test_without_the_pipeline_timesteps_are_what_there_is() -> None:
    kind = GUIDED["wan"]
    pipe = kind.build()
    pipe.update_components(guider=FillGuider(pipe.guider, CONFIGS["budget"]))
    made = generate(pipe, kind)
    report = pipe.guider.report()
    assert report.count == 10 and report.computed_steps == 5 and report.complete
    assert [r.sigma for r in report.steps[::2]] == pytest.approx([t / 1000 for t in pipe.scheduler.timesteps.tolist()])
    assert "leap" not in {r.action for r in report.steps}
    assert any("forecasts were not corrected" in note for note in report.notes)
    assert torch.equal(generate(pipe, kind), made)


# --- refused --------------------------------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    pipe = GUIDED["wan"].build()
    with pytest.raises(UnicpError, match=r"FillGuider wraps a guider of diffusers, got NoneType.*\(Flux\)"):
        FillGuider(getattr(Flux().build(), "guider", None), "budget")  # type: ignore[arg-type]
    with pytest.raises(UnicpError, match="LTX-2 unites the inputs of two guiders"):
        from diffusers.guiders.ltx2_guidance import LTX2Guidance

        FillGuider(LTX2Guidance(), "budget")
    with pytest.raises(UnicpError, match="unicp looks into the blocks of a denoiser, and a guider sees only"):
        FillGuider(pipe.guider, "unicp", pipe)
    with pytest.raises(UnicpError, match="there is no report yet"):
        FillGuider(pipe.guider, "budget", pipe).report()


@pytest.mark.parametrize("other", ["accelerate", "cache"])
def test_another_cache_on_the_denoiser_is_refused_before_it_runs(other: str) -> None:
    kind = GUIDED["wan"]
    pipe = filled(kind.build(), CONFIGS["budget"])
    if other == "accelerate":
        session = unicp.accelerate(pipe, CONFIGS["schedule"])
    else:
        from diffusers import FirstBlockCacheConfig

        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    entrance = pipe.transformer.patch_embedding
    said = "unicp.accelerate acts on this denoiser already" if other == "accelerate" else "has another cache already"
    with counting([entrance]) as counts, pytest.raises(UnicpError, match=said):
        generate(pipe, kind)
    assert counts == [0]
    if other == "accelerate":
        session.restore()
        generate(pipe, kind)


def test_flux_has_no_guider_and_is_accelerated() -> None:
    kind = Flux()
    pipe = kind.build()
    assert not hasattr(pipe, "guider")
    plain = generate(pipe, kind)
    with unicp.accelerate(pipe, CONFIGS["budget"]) as session:
        made = generate(pipe, kind)
        assert torch.equal(generate(pipe, kind), made) and not torch.equal(made, plain)
        assert session.report().computed_steps == 5
    unicp.accelerate(pipe, BudgetConfig(target_speedup=1))
    assert torch.equal(quietly(lambda: generate(pipe, kind)), plain)
