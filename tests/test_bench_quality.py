"""The figures of a comparison, on cases whose answer is known; and what is kept of them."""

from __future__ import annotations

import io
import math
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchmetrics
from PIL import Image

from unicp import UnicpError
from unicp.bench import charts, quality, sprites, statistics, store
from unicp.demo import scenes


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    """A drawn video (13, 96, 96, 3) of something that moves."""
    scene = scenes.Scene(
        things=(scenes.Thing(shape="ball", colour="red", motion="right", speed="fast", x=0.2),),
        tone="gray",
        texture="striped",
    )
    return np.asarray(scenes.render(scene, frames=13, height=96, width=96), dtype=np.float32)


def test_identical(video: np.ndarray) -> None:
    latents = torch.randn(1, 4, 3, 2, 2)
    found = quality.distances(video, video, latents, latents)
    assert found["psnr"] == math.inf and found["temporal_psnr"] == math.inf
    assert found["ssim"] == pytest.approx(1, abs=1e-4) and found["ms_ssim"] == pytest.approx(1, abs=1e-4)
    assert found["latent_change"] == 0 and found["motion_ratio"] == 1


def test_brighter_by_16() -> None:
    """The case that wraps around in eight bits."""
    dark = np.random.default_rng(0).uniform(0, 0.9, (4, 32, 32, 3))
    found = quality.distances(dark + 16 / 255, dark)
    assert found["psnr"] == pytest.approx(24.05, abs=0.005)
    assert found["temporal_psnr"] > 250  # nothing moves otherwise: only rounding is left
    assert found["motion_ratio"] == pytest.approx(1)
    assert found["latent_change"] is None


def test_noise(video: np.ndarray) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, video.shape)
    found = quality.distances(video + noise, video)
    assert found["psnr"] == pytest.approx(20, abs=0.05)
    # Changes between frames hold the noise twice, on a scale of two: -10 log10(2 * 0.01 / 4).
    assert found["temporal_psnr"] == pytest.approx(23.01, abs=0.1)
    assert found["motion_ratio"] > 2
    assert found["ssim"] < 0.7 and found["ssim"] < found["ms_ssim"] < 1


def test_shifted_by_a_frame(video: np.ndarray) -> None:
    """The same motion a frame late: as lively, and yet another video."""
    found = quality.distances(video[1:], video[:-1])
    assert 10 < found["psnr"] < 35
    assert found["motion_ratio"] == pytest.approx(1, abs=0.15)
    assert found["temporal_psnr"] < 40
    frozen = quality.distances(np.repeat(video[:1], len(video), 0), video)
    assert frozen["motion_ratio"] == 0


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (96, 3), (32, 2), (8, 1)])
def test_ms_ssim_takes_as_many_scales_as_fit(side: int, scales: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchmetrics.functional.image as image

    used: list[int] = []
    real = image.multiscale_structural_similarity_index_measure
    spy = lambda *args, betas, **more: used.append(len(betas)) or real(*args, betas=betas, **more)  # noqa: E731
    monkeypatch.setattr(image, "multiscale_structural_similarity_index_measure", spy)
    frame = np.random.default_rng(0).uniform(size=(1, side, side, 3))
    assert quality.ms_ssim(frame, frame) == pytest.approx(1, abs=1e-6)
    assert used == [scales]


# --- LPIPS, whose weights are not always there; nothing is downloaded ----------------------------------------------


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's folder of weights, empty; and as much of torchvision as LPIPS asks of it: AlexNet's layers."""
    from torchmetrics.functional.image import lpips as functional
    from torchmetrics.image import lpip

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def alexnet(weights: Any) -> Any:
        features = alexnet_features()
        features.load_state_dict(torch.load(folder / weights))
        return SimpleNamespace(features=features)

    vision = ModuleType("torchvision")
    vision.__spec__ = ModuleSpec("torchvision", None)
    vision.models = SimpleNamespace(alexnet=alexnet, AlexNet_Weights=SimpleNamespace(DEFAULT=NAME))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", vision)
    monkeypatch.setattr(quality, "_LPIPS", [])
    for place in (functional, lpip):
        monkeypatch.setattr(place, "_TORCHVISION_AVAILABLE", True)
    return folder


NAME = "alexnet-owt-7be5be79.pth"


def alexnet_features() -> Any:
    """Up to the fifth activation; what torchvision's has after it, LPIPS does not use."""
    conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
    return torch.nn.Sequential(
        *(conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, 1, 2), relu(), pool(3, 2)),
        *(conv(192, 384, 3, 1, 1), relu(), conv(384, 256, 3, 1, 1), relu(), conv(256, 256, 3, 1, 1), relu()),
    )


def test_without_weights_lpips_is_not_measured(checkpoints: Path, video: np.ndarray) -> None:
    assert quality.distances(video, video)["lpips"] is None
    assert quality.lpips_note([{"psnr": 30.0, "lpips": None}]).startswith("LPIPS: not measured: weights not found")


def test_without_torchvision_lpips_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda name: None)
    assert quality.lpips_note([{"lpips": None}]) == "LPIPS: not measured: torchvision is not installed"


def test_with_weights_lpips_is_measured(checkpoints: Path, video: np.ndarray) -> None:
    """Against the formula: unit-length features of five layers, weighted squared differences, means over space."""
    torch.manual_seed(0)
    features = alexnet_features().eval()
    torch.save(features.state_dict(), checkpoints / NAME)
    other = np.clip(video + np.random.default_rng(0).normal(0, 0.2, video.shape), 0, 1).astype(np.float32)
    weights = torch.load(Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth", "cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def layers(frames: np.ndarray) -> list[Any]:
        x = (torch.from_numpy(frames) * 2 - 1 - shift) / scale
        x, found = x.permute(0, 3, 1, 2), []
        for number, layer in enumerate(features):
            x = layer(x)
            if number in (1, 4, 7, 9, 11):
                found.append(x / x.norm(dim=1, keepdim=True))
        return found

    with torch.no_grad():
        squares = [(one - two) ** 2 for one, two in zip(layers(other), layers(video), strict=True)]
        apart = [(each * weights[f"lin{n}.model.1.weight"]).sum(1).mean((1, 2)) for n, each in enumerate(squares)]
    assert quality.lpips(other, video) == pytest.approx(float(sum(apart).mean()), rel=1e-4)
    assert quality.lpips(video, video) == 0
    assert quality.lpips_note([{"lpips": 0.1}]) == ""
    assert "1 of 2 videos" in quality.lpips_note([{"lpips": 0.1}, {"lpips": None}])
    assert quality.lpips(video[:, :8, :8], video[:, :8, :8]) is None  # AlexNet pools it to nothing
    assert "1 of 1 videos: smaller than 32 pixels" in quality.lpips_note([{"lpips": None}])


# --- the caption check ----------------------------------------------------------------------------------------------


def test_caption_check(video: np.ndarray) -> None:
    right = quality.caption_check(video, "a red ball moving right fast over a gray striped background")
    assert right is not None and right["colour"] and right["direction"]
    wrong = quality.caption_check(video, "a blue ball moving left fast over a gray striped background")
    assert wrong is not None and not wrong["colour"] and not wrong["direction"]
    assert quality.caption_check(video, "a cat on a surfboard") is None


# --- figures over prompts -------------------------------------------------------------------------------------------


def test_estimates() -> None:
    values = [float(v) for v in np.random.default_rng(1).normal(30, 2, 32)]
    found = statistics.estimate(values)
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(np.mean(values)) and found.worst == min(values)
    # The textbook's interval of a mean of 32 normal values.
    half = 1.96 * np.std(values, ddof=1) / math.sqrt(32)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)
    assert statistics.estimate(values) == found  # the same draws every time
    two = statistics.estimate([1.0, 3.0], higher=None)
    assert two is not None and two.low is None and two.worst == 3.0


def test_speedups_pair_the_runs_of_a_round() -> None:
    # The machine was twice as slow in the second round, for both.
    assert statistics.speedups([[2.0, 4.0]], [[1.0, 2.0]]) == [2.0]
    assert statistics.interpolate([(2.0, 20.0), (1.0, 30.0)], 1.5) == 25.0
    assert statistics.interpolate([(2.0, 20.0), (1.0, 30.0)], 2.5) is None


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_store(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.sqlite"
    key = store.Key({"prompt": "a", "call": {"prompt_embeds": torch.ones(2)}})
    kept = store.Store(path)
    assert kept.get(key) is None
    kept.put(key, {"seconds": 1.5}, video=b"123")
    kept.close()
    again = store.Store(path)
    assert again.get(key) == {"seconds": 1.5} and again.blob(key, "video") == b"123" and len(again) == 1
    other = store.Key({"prompt": "a", "call": {"prompt_embeds": torch.zeros(2)}})
    assert again.get(other) is None and again.blob(other, "video") is None
    again.close()


def test_store_refuses_other_files(tmp_path: Path) -> None:
    text = tmp_path / "text.sqlite"
    text.write_text("not a database, but long enough to be looked at " * 20)
    with pytest.raises(UnicpError, match=r"text\.sqlite as a file of results"):
        store.Store(text)
    path = tmp_path / "old.sqlite"
    store.Store(path).close()
    with sqlite3.connect(path) as base:
        base.execute("UPDATE format SET version = 99")
    with pytest.raises(UnicpError, match="format 99, this is format 1"):
        store.Store(path)


def test_sixteen_bits_are_enough(video: np.ndarray) -> None:
    from unicp.tensors import metrics

    assert metrics.psnr(store.from_sixteen_bits(store.sixteen_bits(video)), video) > 100


def test_a_sheet_holds_every_frame(video: np.ndarray) -> None:
    plan = sprites.layout(*video.shape[:3])
    page = np.asarray(Image.open(io.BytesIO(sprites.sheet(video))).convert("RGB"))
    for number, frame in enumerate(video):
        row, column = divmod(number, plan.columns)
        shown = page[row * 96 : row * 96 + 96, column * 96 : column * 96 + 96]
        assert np.array_equal(shown, (frame * 255 + 0.5).astype(np.uint8))  # small ones without loss


def test_large_videos_become_small_sheets() -> None:
    large = np.zeros((81, 60, 640, 3), np.uint8)
    plan = sprites.layout(*large.shape[:3])
    assert (plan.frames, plan.width, plan.lossless) == (41, 320, False)
    assert Image.open(io.BytesIO(sprites.sheet(large))).size[0] == plan.columns * 320


def test_charts_are_well_formed() -> None:
    dots = [charts.Dot(1.5, 30.0, 29.0, 31.0, "a < b"), charts.Dot(2.0, 25.0), charts.Dot(1.0, 100.0, off=True)]
    svg = charts.scatter([charts.Curve("x & y", dots, 3, ours=True)], "speed", "PSNR")
    root = ElementTree.fromstring(svg)
    assert len(root.findall(".//polyline")[0].get("points", "").split()) == 2  # not to the one beyond the scale
    assert "identical" in "".join(root.itertext())
    ElementTree.fromstring(charts.timeline([("call 1", [1.0, 0.0, 0.5])], label="t"))
    ElementTree.fromstring(charts.lines({"call 1": [(1, 0.2), (2, 0.1)]}, "step", "change"))


def test_every_colour_of_the_charts_is_defined_for_light_and_dark() -> None:
    templates = Path(charts.__file__).parent / "templates"
    page = (templates / "report.css").read_text("utf-8")
    assert [page.count(f"--c{number}:") for number in range(charts.COLOURS + 1)] == [3] * charts.COLOURS + [0]
    body = (templates / "report.html").read_text("utf-8")
    assert body.count("colour %") == body.count("colour % colours ") > 0  # no number of its own
