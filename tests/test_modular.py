"""Modular pipelines of diffusers: blocks instead of a ``__call__``, and a guider that names the branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

import unicp
from tests.contract import actions, case, quietly, traces
from tests.family import part
from tests.tiny import FAMILIES
from tests.tiny_parts import HUNYUAN, WAN, model

NAMES = ("adacache-residual", "adacache-forecast", "schedule-linear", "unicp-online", "budget-default")


def _assembled(module: str, core: str, **components: Any) -> Any:
    """The pipeline of a model's denoising blocks, without those for text and VAE."""
    blocks = getattr(__import__(f"diffusers.modular_pipelines.{module}", fromlist=[core]), core)
    pipe = blocks().init_pipeline()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(seed))


class _Wan:
    branches = ("call 1", "call 2")  # its blocks set no cache context

    def build(self, guider: Any = None) -> Any:
        part("WanModularPipeline")
        return _assembled(
            "wan.modular_blocks_wan",
            "WanCoreDenoiseStep",
            transformer=model("WanTransformer3DModel", **{**WAN, "in_channels": 16, "out_channels": 16}),
            scheduler=FAMILIES["wan"].build().scheduler,
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
        )

    def call(self) -> dict[str, Any]:
        return {"prompt_embeds": _embeds(1), "negative_prompt_embeds": _embeds(101)}


class _Hunyuan15:
    branches = ("pred_cond", "pred_uncond")

    def build(self, guider: Any = None) -> Any:
        part("HunyuanVideo15ModularPipeline")
        config = {**HUNYUAN, "num_layers": 3, "in_channels": 65, "out_channels": 32}
        return _assembled(
            "hunyuan_video1_5.modular_blocks_hunyuan_video1_5",
            "HunyuanVideo15CoreDenoiseStep",
            transformer=model("HunyuanVideo15Transformer3DModel", **config, text_embed_2_dim=16, image_embed_dim=8),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
        )

    def call(self) -> dict[str, Any]:
        call: dict[str, Any] = {}
        for seed, sign, prefix in ((1, 1.0, ""), (101, -1.0, "negative_")):
            call[f"{prefix}prompt_embeds"] = _embeds(seed)
            call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 8)
            call[f"{prefix}prompt_embeds_2"] = sign * torch.ones(1, 3, 16)
            call[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 3)
        return call


KINDS = {"wan": _Wan(), "hunyuan-video-1.5": _Hunyuan15()}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def _run(pipe: Any, kind: Any, steps: int = 10) -> torch.Tensor:
    made: torch.Tensor = pipe(
        **kind.call(),
        num_inference_steps=steps,
        height=32,
        width=32,
        num_frames=9,
        generator=torch.Generator().manual_seed(0),
        output="latents",
    )
    return made


@kinds
@pytest.mark.parametrize("name", NAMES)
def test_a_modular_pipeline_is_accelerated(kind: Any, name: str) -> None:
    pipe = kind.build()
    before = traces(pipe.transformer)
    plain = _run(pipe, kind)
    session = unicp.accelerate(pipe, case(name).config)
    first, second = _run(pipe, kind), _run(pipe, kind)
    assert torch.equal(first, second)
    assert not torch.equal(first, plain)
    report = session.report()
    assert len(session.reports) == 2
    assert actions(session.reports[0]) == actions(report)
    assert report.count == 10  # its scheduler is asked, as any pipeline's
    assert [r.branch for r in report.steps] == list(kind.branches) * 10
    assert [r.index for r in report.steps] == [i for i in range(10) for _ in kind.branches]
    assert {r.action for r in report.steps} > {"compute"}
    session.restore()
    assert traces(pipe.transformer) == before
    assert torch.equal(_run(pipe, kind), plain)
    unicp.accelerate(pipe, case(name).always_compute)
    assert torch.equal(quietly(lambda: _run(pipe, kind)), plain)


@kinds
def test_its_transformer_alone(kind: Any) -> None:
    pipe = kind.build()
    plain = _run(pipe, kind)
    session = unicp.accelerate(pipe.transformer, case("adacache-residual").config)
    assert not torch.equal(_run(pipe, kind), plain)
    assert _run(pipe, kind, steps=7).isfinite().all()
    assert len(session.reports) == 2


def test_a_guider_that_skips_blocks() -> None:
    """It puts hooks on blocks for one of three calls of a step, and takes them off: a branch of its own."""
    kind = KINDS["wan"]
    guider = SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig([1], fqn="blocks"),
    )
    pipe = kind.build(guider)
    plain = _run(pipe, kind)
    unicp.accelerate(pipe, case("adacache-residual").always_compute)
    assert torch.equal(quietly(lambda: _run(pipe, kind)), plain)
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    first = _run(pipe, kind)
    assert torch.equal(_run(pipe, kind), first)
    report = session.report()
    assert len({r.branch for r in report.steps}) == 3
    assert "reuse" in {r.action for r in report.steps}
    session.restore()
    assert torch.equal(_run(pipe, kind), plain)


def test_blocks_whose_components_were_not_loaded_are_refused() -> None:
    part("WanModularPipeline")
    pipe = _assembled("wan.modular_blocks_wan", "WanCoreDenoiseStep")
    with pytest.raises(unicp.UnicpError, match="WanModularPipeline has no component named transformer"):
        unicp.accelerate(pipe, case("adacache-residual").config)
