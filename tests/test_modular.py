"""Modular pipelines of diffusers: blocks instead of a ``__call__``, and a guider that names the branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig

import unicp
from tests.contract import actions, case, covering, quietly, traces
from tests.family import part
from tests.tiny_modular import MODULAR, assembled

NAMES = ("adacache-residual", "adacache-forecast", "schedule-linear", "unicp-online", "budget-default")


kinds = pytest.mark.parametrize("kind", MODULAR.values(), ids=MODULAR)


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


@pytest.mark.parametrize(("name", "of"), covering(NAMES, MODULAR))
def test_a_modular_pipeline_is_accelerated(name: str, of: str) -> None:
    kind = MODULAR[of]
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
    kind = MODULAR["wan"]
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
    pipe = assembled("wan.modular_blocks_wan", "WanCoreDenoiseStep")
    with pytest.raises(unicp.UnicpError, match="WanModularPipeline has no component named transformer"):
        unicp.accelerate(pipe, case("adacache-residual").config)
