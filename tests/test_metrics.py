"""Metrics on cases whose answer is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from unicp.tensors.metrics import frame_difference, motion_ratio, psnr, relative_change, ssim, temporal_psnr

NAN, INF = math.nan, math.inf


def _video(seed: int = 0, frames: int = 4, size: int = 24) -> torch.Tensor:
    return torch.rand(frames, size, size, 3, generator=torch.Generator().manual_seed(seed))


# --- change -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[2.0, -2.0]], [[1.0, -1.0]], 1.0),
        ([[0.0, 0.0]], [[1.0, -1.0]], 1.0),
        ([[1.0, 3.0], [5.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], 2.0),  # the worst sample, not the mean
        ([[5.0, 1.0], [1.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]], 2.0),
        ([[0.0, 0.0]], [[0.0, 0.0]], 0.0),  # nothing there, nothing changed
        ([[0.0, 1.0]], [[0.0, 0.0]], INF),
        ([[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]], 0.0),
        ([[NAN, 1.0]], [[1.0, 1.0]], NAN),
        ([[1.0, 1.0]], [[NAN, 1.0]], NAN),
        ([[NAN]], [[NAN]], NAN),
        ([[9.0, 9.0], [NAN, 1.0]], [[1.0, 1.0], [1.0, 1.0]], NAN),
        ([[INF, 1.0]], [[1.0, 1.0]], INF),
        ([[INF]], [[INF]], NAN),
    ],
)
def test_relative_change(new: list[Any], old: list[Any], expected: float) -> None:
    found = relative_change(torch.tensor(new), torch.tensor(old))
    assert found.dtype == torch.float32
    assert found.ndim == 0
    assert float(found) == pytest.approx(expected, nan_ok=True)


def test_relative_change_takes_any_shape_and_adds_up_in_float32() -> None:
    old = torch.ones(2, 300, 400, dtype=torch.float16)  # the sum alone exceeds float16
    new = old.clone()
    new[1] *= 1.5
    assert float(relative_change(new, old)) == pytest.approx(0.5)
    assert float(relative_change(new.bfloat16(), old.bfloat16())) == pytest.approx(0.5)


# --- motion score -----------------------------------------------------------------------------------------------------


def _frames(*values: float) -> torch.Tensor:
    return torch.tensor(values).reshape(1, -1, 1, 1).expand(1, len(values), 2, 3)


@pytest.mark.parametrize(
    ("features", "strides", "expected"),
    [
        (_frames(1, 1, 1), (1,), 0.0),
        (_frames(1, -1, 1), (1,), 1.0),  # the largest there is
        (_frames(1, 3), (1,), 0.5),
        (_frames(1, 3, 1), (1,), 0.5),
        (_frames(1, 3, 1), (2,), 0.0),
        (_frames(1, 3, 1), (1, 2), 0.25),
        (_frames(1, 3, 1), (1, 9), 0.5),  # strides beyond the frames are left out
        (_frames(1, 3, 1), (9,), 0.0),
        (_frames(5), (1,), 0.0),
        (_frames(0, 0), (1,), 0.0),
        (_frames(0, 1), (1,), 1.0),
        (_frames(NAN, 1), (1,), NAN),
        (torch.cat([_frames(1, 1, 1), _frames(1, 3, 1)]), (1,), 0.5),  # the sample that moves most
        (torch.cat([_frames(1, 3, 1), _frames(1, 1, 1)]), (1,), 0.5),
    ],
)
def test_frame_difference(features: torch.Tensor, strides: tuple[int, ...], expected: float) -> None:
    found = frame_difference(features, strides)
    assert float(found) == pytest.approx(expected, nan_ok=True)
    assert found.dtype == torch.float32
    if expected == expected:
        assert float(frame_difference(features.half(), strides)) == pytest.approx(expected, abs=1e-3)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_psnr_of_a_uniform_shift() -> None:
    """+16 of 255, which wraps around where uint8 arrays are subtracted."""
    video = _video() * (239 / 255)
    assert psnr(video + 16 / 255, video) == pytest.approx(24.0485, abs=1e-3)
    assert psnr(video, video + 16 / 255) == pytest.approx(24.0485, abs=1e-3)


def test_psnr_of_known_errors() -> None:
    video = torch.zeros(2, 4, 4, 3)
    assert psnr(video, video) == INF
    assert psnr(video + 1, video) == pytest.approx(0)
    assert psnr(video + 0.1, video) == pytest.approx(20, abs=1e-4)
    # The error is averaged over the whole video, not the decibels over its frames.
    other = video.clone()
    other[0] += 0.1
    assert psnr(other, video) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def test_psnr_falls_with_noise() -> None:
    video, noise = _video(), _video(1) - 0.5
    values = [psnr(video + scale * noise, video) for scale in (0.01, 0.1, 0.5)]
    assert values == sorted(values, reverse=True)
    # Uniform noise of width w has a mean square of w²/12.
    assert values[1] == pytest.approx(-10 * math.log10(0.1**2 / 12), abs=0.2)


@pytest.mark.parametrize("metric", [psnr, ssim, motion_ratio, temporal_psnr])
def test_other_shapes_are_refused(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"\(4, 24, 24, 3\).*\(3, 24, 24, 3\)"):
        metric(_video(), _video()[:3])


@pytest.mark.parametrize("metric", [psnr, ssim, motion_ratio, temporal_psnr])
def test_arrays_do_as_well(metric: Any) -> None:
    a, b = _video(0), _video(1)
    assert metric(a.numpy(), b.numpy()) == pytest.approx(metric(a, b))


def test_ssim() -> None:
    video, noise = _video(), _video(1) - 0.5
    assert ssim(video, video) == pytest.approx(1)
    values = [ssim(video + scale * noise, video) for scale in (0.0, 0.05, 0.2, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8
    assert ssim(1 - video, video) < 0
    assert ssim(_video(size=8), _video(size=8)) == pytest.approx(1)  # smaller than the window


# --- motion of videos -------------------------------------------------------------------------------------------------


def test_motion_ratio() -> None:
    video = _video()
    still = video[:1].expand(4, -1, -1, -1)
    assert motion_ratio(video, video) == 1
    assert motion_ratio(still, video) == 0
    assert motion_ratio(still, still) == 1
    assert motion_ratio(video, still) == INF
    assert motion_ratio(video[:1], video[:1]) == 1
    assert motion_ratio(video * 0.5, video) == pytest.approx(0.25)
    assert motion_ratio(video + 0.2, video) == pytest.approx(1)  # brightness is not motion


def test_temporal_psnr() -> None:
    video = _video()
    assert temporal_psnr(video, video) == INF
    assert temporal_psnr(video + 0.2, video) > 100  # the same motion
    assert temporal_psnr(video[:1], _video(1)[:1]) == INF  # a single frame does not move
    flicker = video.clone()
    flicker[1::2] += 0.1
    # Every change is off by 0.1, of a range of 2.
    assert temporal_psnr(flicker, video) == pytest.approx(-20 * math.log10(0.05), abs=1e-3)
