"""Distances between two tensors or two videos. Pure functions; everything is computed in floating point.

SSIM comes from torchmetrics; the other metrics are written here.
"""

from __future__ import annotations

import math
from typing import Any

import torch

CHUNK = 2**24
"""Elements of a sample that are compared at a time. Larger tensors are never copied as a whole to be measured."""


def distances(new: Any, old: Any) -> Any:
    """``sum|a - b|`` of each sample, in float32: a tensor (B,).

    Args:
        new, old: tensors (B, N) of one shape.
    """
    pieces = zip(new.split(CHUNK, dim=1), old.split(CHUNK, dim=1), strict=True)
    return _added([(a.float() - b.float()).abs_().sum(1) for a, b in pieces])


def sizes(x: Any) -> Any:
    """``sum|x|`` of each sample, in float32: a tensor (B,).

    Args:
        x: a tensor (B, N).
    """
    return _added([piece.abs().float().sum(1) for piece in x.split(CHUNK, dim=1)])


def frame_sizes(features: Any) -> Any:
    """``sum|p|`` of each frame of each sample, in float32: a tensor (B, F).

    Args:
        features: (B, F, S, C).
    """
    if features[0].numel() <= CHUNK:
        return features.flatten(2).abs().float().sum(2)
    return torch.stack([sizes(frame.flatten(1)) for frame in features.unbind(1)], dim=1)


def _added(sums: list[Any]) -> Any:
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def relative_change(new: Any, old: Any, size: Any = None) -> Any:
    """``rel(a, b) = sum|a - b| / sum|b|`` of each sample, and of these the largest: there is one decision per batch.

    Args:
        new, old: tensors of one shape (B, ...).
        size: ``sum|b|`` of each sample, (B,), where it is known.

    Returns:
        A float32 scalar tensor on the inputs' device. Where ``old`` is zero: 0 if ``new`` is zero too, else inf.

    >>> float(relative_change(torch.tensor([[2.0, 2.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])))
    1.0
    """
    new, old = new.flatten(1), old.flatten(1)
    return quotient(distances(new, old), sizes(old) if size is None else size).max()


def quotient(difference: Any, size: Any) -> Any:
    """One sum over the other, of each sample.

    0 / 0 means "nothing there, nothing changed"; x / 0 stays infinite, which no policy takes for "reuse". Where either
    has something that is no number, so has ``difference``.
    """
    return difference / (size + (difference == 0))


def frame_difference(features: Any, strides: tuple[int, ...] = (1,), size: Any = None) -> Any:
    """Motion score of AdaCache's MoReg (arXiv 2411.02397, section 4.3; normalised as in its reference code).

    ``m = mean over strides k of  sum|p[k:] - p[:-k]| / (sum|p[k:]| + sum|p[:-k]|)`` over token frames, of each
    sample, then the largest.

    Args:
        features: (B, F, S, C) with F token frames of S tokens.
        strides: distances between compared frames; those of F or more are left out.
        size: what :func:`frame_sizes` says of them, where it is known.

    Returns:
        A float32 scalar tensor in [0, 1]; zero for a single frame.
    """
    frames = features.shape[1]
    strides = tuple(k for k in strides if k < frames)
    if not strides:
        return torch.zeros((), device=features.device)
    if size is None:
        size = frame_sizes(features)
    large = features[0].numel() > CHUNK
    scores = []
    for k in strides:
        both = size.narrow(1, k, frames - k).sum(1) + size.narrow(1, 0, frames - k).sum(1)
        if large:  # frame by frame
            pairs = [(features[:, f + k].flatten(1), features[:, f].flatten(1)) for f in range(frames - k)]
            difference = _added([distances(late, early) for late, early in pairs])
        else:
            late, early = features.narrow(1, k, frames - k), features.narrow(1, 0, frames - k)
            difference = (late.float() - early.float()).flatten(1).abs_().sum(1)
        scores.append(quotient(difference, both))
    return (scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)).max()


def _pair(video: Any, reference: Any) -> tuple[Any, Any]:
    a, b = (torch.as_tensor(v).double() for v in (video, reference))
    if a.shape != b.shape:
        raise ValueError(f"videos differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    return a, b


def psnr(video: Any, reference: Any) -> float:
    """Peak signal-to-noise ratio in dB of two videos (F, H, W, 3) in [0, 1]; infinite if they are equal.

    >>> round(psnr(torch.full((1, 2, 2, 3), 16 / 255), torch.zeros(1, 2, 2, 3)), 2)
    24.05
    """
    a, b = _pair(video, reference)
    error = float((a - b).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(video: Any, reference: Any) -> float:
    """Structural similarity (torchmetrics: 11-pixel Gaussian window), mean over frames, of (F, H, W, 3) in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = _pair(video, reference)
    # A window of 11 needs pictures at least that large.
    size = min(11, (min(a.shape[1:3]) - 1) // 2 * 2 + 1)
    value = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2).float(), b.permute(0, 3, 1, 2).float(), data_range=1.0, kernel_size=size
    )
    return float(value)


def motion_ratio(video: Any, reference: Any) -> float:
    """Motion energy of ``video`` over that of ``reference``: mean squared change between neighbouring frames.

    One means that motion is preserved; below one, that it was damped. If the reference stands still: 1 if the
    video does too, else infinite.
    """
    a, b = _pair(video, reference)
    moved, reference_moved = (float((v[1:] - v[:-1]).square().mean()) if len(v) > 1 else 0.0 for v in (a, b))
    if reference_moved == 0:
        return 1.0 if moved == 0 else math.inf
    return moved / reference_moved


def temporal_psnr(video: Any, reference: Any) -> float:
    """PSNR in dB of the changes between neighbouring frames, which lie in [-1, 1]; it compares motion."""
    a, b = _pair(video, reference)
    if len(a) < 2:
        return math.inf
    error = float(((a[1:] - a[:-1]) - (b[1:] - b[:-1])).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error / 4)
