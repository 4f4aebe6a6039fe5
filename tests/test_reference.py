"""The engine against the literal per-block AdaCache: the same decisions, the same latents up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import unicp
from tests.reference import adacache_per_block as reference
from tests.tiny import wan_transformer
from unicp.policies.adacache import CODEBOOKS

SIGMAS = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, 31, dtype=torch.float64).tolist()]
FINE = ((0.05, 5), (0.08, 4), (0.11, 3), (0.2, 2), (1.0, 1))
COARSE = ((0.1, 2), (0.5, 3), (1e6, 4))  # rates may also rise


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's blocks round to float32 on the way (``.float()``); leave float64 as it is."""
    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x, *a, **k: x if x.dtype == torch.float64 else plain(x, *a, **k))


def _inputs(batch: int, frames: int) -> tuple[torch.nn.Module, torch.Tensor, dict[str, torch.Tensor]]:
    transformer = wan_transformer(seed=3, layers=5).double()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 4, frames, 4, 4, generator=generator, dtype=torch.float64)
    texts = {b: torch.randn(batch, 6, 16, generator=generator, dtype=torch.float64) for b in ("cond", "uncond")}
    return transformer, latents, texts


def _sample(
    transformer: Any, latents: torch.Tensor, texts: dict[str, torch.Tensor], sigmas: Sequence[float]
) -> torch.Tensor:
    """The same loop as the reference's, with the transformer as it is and the contexts that Wan's pipeline sets."""
    for step in range(len(sigmas) - 1):
        outputs = {}
        for branch, text in texts.items():
            time = torch.full((latents.shape[0],), sigmas[step] * 1000, dtype=latents.dtype)
            context = {"step_index": step, "sigma": sigmas[step], "num_inference_steps": len(sigmas) - 1}
            with transformer.cache_context(branch, **context):
                outputs[branch] = transformer(latents, time, text, return_dict=False)[0]
        guided = outputs["uncond"] + 4.0 * (outputs["cond"] - outputs["uncond"])
        latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
    return latents


def _numbers(values: list[float | None]) -> list[float]:
    return [-1.0 if value is None else value for value in values]


CASES: dict[str, dict[str, Any]] = {
    "fine": {"codebook": FINE},
    "coarse": {"codebook": COARSE},
    "opensora-30-slow": {"codebook": "opensora-30-slow"},
    "opensora-30-fast": {"codebook": "opensora-30-fast"},
    "moreg": {"codebook": FINE, "moreg": True, "moreg_scale": 0.5, "moreg_power": 2.0, "moreg_gradient": 1.0},
    "moreg-as-published": {"codebook": "opensora-30-fast", "moreg": True},
    "moreg-paper": {"codebook": FINE, "moreg": True, "moreg_form": "paper", "moreg_scale": 0.5, "moreg_power": 2.0},
    "moreg-strides": {
        "codebook": FINE,
        "moreg": True,
        "moreg_scale": 0.6,
        "moreg_power": 1.0,
        "moreg_gradient": 3.0,
        "moreg_window": (0.2, 0.7),
        "moreg_strides": (1, 2, 9),
    },
    "moreg-one-frame": {"codebook": FINE, "moreg": True, "frames": 1},
    "batch": {"codebook": FINE, "moreg": True, "moreg_scale": 0.5, "moreg_power": 2.0, "batch": 3},
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", CASES)
def test_engine_and_reference_agree(name: str) -> None:
    fields = dict(CASES[name])
    transformer, latents, texts = _inputs(fields.pop("batch", 1), fields.pop("frames", 3))
    config = unicp.AdaCacheConfig(**fields)
    codebook = CODEBOOKS[config.codebook].entries if isinstance(config.codebook, str) else config.codebook
    with torch.no_grad():
        expected, trace = reference.sample(
            transformer,
            latents,
            texts,
            SIGMAS,
            codebook,
            moreg=config.moreg_form if config.moreg else None,
            scale=config.moreg_scale,
            power=config.moreg_power,
            gradient_weight=config.moreg_gradient,
            window=config.moreg_window,
            strides=config.moreg_strides,
        )
        session = unicp.accelerate(transformer, config)
        found = _sample(transformer, latents, texts, SIGMAS)
        session.restore()
        unaccelerated = _sample(transformer, latents, texts, SIGMAS)
    decided = [r for r in session.report().steps if r.branch == "cond" and r.action == "compute"]
    assert [r.index for r in decided] == trace.computed
    assert 4 < len(trace.computed) < 30, "the case must both compute and reuse"
    assert _numbers([r.metric for r in decided]) == pytest.approx(_numbers(trace.changes), rel=1e-9)
    assert decided[0].metric is None
    assert _numbers([r.motion for r in decided]) == pytest.approx(_numbers(trace.motions), rel=1e-9)
    assert (found - expected).abs().max() < 1e-12
    assert (found - unaccelerated).abs().max() > 1e-6, "reuse must show, or the comparison says nothing"


@pytest.mark.usefixtures("double")
def test_the_reference_computes_as_diffusers_does() -> None:
    """With every step computed, the written-out blocks are Wan's own."""
    transformer, latents, texts = _inputs(2, 3)
    with torch.no_grad():
        expected = _sample(transformer, latents, texts, SIGMAS)
        found, trace = reference.sample(transformer, latents, texts, SIGMAS, ((1.0, 1),))
    assert trace.computed == list(range(30))
    assert (found - expected).abs().max() < 1e-12
