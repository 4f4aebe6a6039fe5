"""Units that feed another one alone: where that one is filled they do not run, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp import UniCPConfig
from unicp.engine.fills.units import Units
from unicp.engine.report import SessionReport
from unicp.errors import UnicpError
from unicp.specs import ModelSpec, find_spec, register_spec

HUNYUAN = FAMILIES["hunyuan-video"]
LARGE = {"delta": 1e6, "delta_cross": 1e6, "delta_mlp": 1e6, "max_window": 2}
"""Whatever is measured, so much is kept as may be."""


def made(config: UniCPConfig, spec: ModelSpec | None = None, family: str = "hunyuan-video") -> tuple[Any, ...]:
    """Latents, report, and how often each feeding linear layer of the first single-stream block ran."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    block = pipe.transformer.single_transformer_blocks[0]
    ran = {"proj_mlp": 0, "attn.to_q": 0}

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            ran[name] += 1
            return forward(*args, **kwargs)

        return count

    for name in ran:
        layer = block.get_submodule(name)
        layer.forward = counted(name, layer.forward)
    session = unicp.accelerate(pipe, config, spec=spec)
    latents = quietly(lambda: chosen.generate(pipe))
    return latents, session.report(), ran


def without_feeds(family: str = "hunyuan-video") -> ModelSpec:
    """The family's spec, in which single-stream blocks have the last projection as their one unit."""
    spec = find_spec(FAMILIES[family].build().transformer)
    assert spec is not None
    double, single = spec.block_lists
    return replace(spec, block_lists=(double, replace(single, units={"proj_out": "mlp"}, feeds={})))


def of_units(report: SessionReport, name: str) -> list[str]:
    return [record.units.get(name, "compute") for record in report.steps]


@pytest.mark.parametrize("family", ["hunyuan-video", "framepack", "motif"])
@pytest.mark.parametrize("fill", ["reuse", "forecast"])
def test_what_feeds_a_filled_unit_does_not_run_and_no_bit_changes(family: str, fill: str) -> None:
    config = UniCPConfig(fill=fill, windows="shared", correct=False, **LARGE)
    latents, report, ran = made(config, family=family)
    in_full, _, all_of_them = made(config, without_feeds(family), family)
    assert torch.equal(latents, in_full)
    filled = sum(action == fill for action in of_units(report, "single_transformer_blocks.0.proj_out"))
    assert filled > len(report.steps) / 3
    assert ran == {name: len(report.steps) - filled for name in ran}
    assert all_of_them == {name: len(report.steps) for name in ran}


def test_nothing_is_kept_of_what_only_runs_for_a_filled_unit() -> None:
    kept = [made(UniCPConfig(**LARGE), spec)[1].cache_bytes for spec in (None, without_feeds())]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("windows", ["shared", "unit"])
@pytest.mark.parametrize("pcas", [True, False])  # with it attention is a unit, though it is never filled
def test_a_unit_is_computed_where_what_feeds_it_is_to_be(pcas: bool, windows: str) -> None:
    config = UniCPConfig(windows=windows, pcas=pcas, correct=False, **{**LARGE, "delta": 0.0})
    _, report, ran = made(config)
    assert set(of_units(report, "single_transformer_blocks.0.proj_out")) == {"compute"}
    assert ran == {name: len(report.steps) for name in ran}
    assert "forecast" in of_units(report, "transformer_blocks.0.ff")


@pytest.mark.parametrize("windows", ["shared", "block", "unit"])
def test_a_unit_is_filled_together_with_all_that_feed_it(windows: str) -> None:
    _, report, _ = made(UniCPConfig(windows=windows, **LARGE))
    for i in range(len(HUNYUAN.build().transformer.single_transformer_blocks)):
        last, mlp, attention = (
            of_units(report, f"single_transformer_blocks.{i}.{name}") for name in ("proj_out", "proj_mlp", "attn")
        )
        assert mlp == last and "forecast" in last
        assert all(a == "forecast" for a, b in zip(attention, last, strict=True) if b == "forecast")


def test_a_limit_of_bytes_counts_what_does_not_run() -> None:
    _, whole, _ = made(UniCPConfig(correct=False, **LARGE))
    _, report, ran = made(UniCPConfig(correct=False, max_cache_bytes=int(whole.cache_bytes * 0.6), **LARGE))
    assert report.cache_bytes <= 0.6 * whole.cache_bytes
    assert ran["proj_mlp"] == ran["attn.to_q"] < len(report.steps)  # they save the most for what is kept


def test_a_limit_keeps_nothing_of_what_does_not_run_for_what_is_kept() -> None:
    names = {"attention": "joint_attention", "wide": "mlp", "last": "mlp", "other": "mlp"}
    modules = {name: torch.nn.Identity() for name in names}
    feeds = {"attention": "last", "wide": "last"}
    units = Units(modules, names, (), lambda run, _: run, feeds=feeds, unkept={"wide"}, cache_bytes=25)
    units.sizes = {"attention": 10, "last": 10, "other": 10}
    costs = {"attention": 50, "wide": 30, "last": 10, "other": 5}
    units.choose(costs, 1)
    assert units.chosen == {"last", "other"}
    assert units.shares(costs, 100) == {"attention": 0.5, "wide": 0.3, "last": 0.1, "other": 0.05}


def test_feeds_name_units() -> None:
    spec = without_feeds()
    double, single = spec.block_lists
    wrong = replace(spec, classes=("None",), block_lists=(double, replace(single, feeds={"attn": "proj_out"})))
    with pytest.raises(UnicpError, match="unknown unit in feeds of 'single_transformer_blocks' 'attn'"):
        register_spec(wrong)
