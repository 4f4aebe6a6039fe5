"""The benchmark of full-size models: its configs are the published ones, and it runs, at a tiny size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import full_size, slicing

PARAMETERS = {"wan-1.3b": 1_418_996_800, "wan-14b": 14_288_491_584, "hunyuan-video": 12_821_012_544}


@pytest.mark.parametrize("name", full_size.MODELS)
def test_the_configs_have_the_published_number_of_parameters(name: str) -> None:
    model = full_size.MODELS[name].build(device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    kept = {parameter.dtype for parameter in model.parameters()}
    assert torch.bfloat16 in kept


@pytest.mark.filterwarnings("ignore::unicp.errors.UnicpWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "wan-1.3b")) for name in full_size.MODELS]
)
@pytest.mark.slow
def test_it_runs_at_a_tiny_size(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = full_size.main(["--tiny", "--steps", "6", "--models", name])
    assert list(figures) == [name]
    plans = figures[name]["plans"]
    assert list(plans) == list(full_size.PLANS)
    assert plans["adacache, computing all"]["computed_fraction"] == 1
    assert plans["schedule, every second step"]["computed_fraction"] < 0.9
    assert plans["adacache, every second step"]["computed_fraction"] < 1
    assert plans["schedule, every second step"]["cache_bytes"] > 0
    for plan in list(full_size.PLANS)[1:]:
        measured, rehearsed = plans[plan]["computed_fraction"], plans[plan]["rehearsed"]["computed_fraction"]
        assert rehearsed == pytest.approx(measured, rel=0.1)
    ways = figures[name]["ways"]
    assert list(ways) == list(full_size.WAYS)
    for each in ways.values():
        assert list(each) == list(full_size.IN_WAYS), each
        assert each["budget, 2x"]["computed_fraction"] == plans["budget, 2x"]["computed_fraction"]
    assert f"{name}: " in capsys.readouterr().out


def test_what_does_not_fit_into_the_minutes_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert full_size.main(["--tiny", "--minutes", "0"]) == {}
    assert "left out, for want of time: attention of 256 tokens; wan-1.3b: everything" in capsys.readouterr().out


def test_full_size_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="full-size models need a GPU"):
        full_size.main([])
    with pytest.raises(SystemExit, match="unknown model 'sora'"):
        full_size.main(["--tiny", "--models", "sora"])


def test_attention_is_sliced_at_any_length() -> None:
    (row,) = slicing.measure(64, 2, [32], 1, torch.device("cpu"))
    assert row["tokens"] == 64 and row["arithmetic_speedup"] > 1 and 0 < row["error_random_weights"] < 1
