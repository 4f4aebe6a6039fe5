"""Distances of a video from the unaccelerated one of the same prompt and seed, in floating point over all frames."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnicpError
from ..tensors import metrics

STANDARD_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of the five scales of MS-SSIM (Wang et al., 2003)."""
WINDOW = 11
MIN_LPIPS_SIDE = 32
"""Fewest pixels of the shorter side for LPIPS: below that, AlexNet pools to nothing."""
MAX_PSNR_DB = 100.0
"""PSNR in dB that stands for an infinite one in a mean."""


@dataclass(frozen=True)
class Measure:
    """How a figure is shown. ``higher``: more of it is nearer; ``None``: one is best."""

    name: str
    title: str
    unit: str
    higher: bool | None
    digits: int
    meaning: str


MEASURES = (
    Measure("psnr", "PSNR", "dB", True, 1, "peak signal-to-noise ratio of all pixels of all frames"),
    Measure("ssim", "SSIM", "", True, 4, "structural similarity, 11-pixel Gaussian window, mean over frames"),
    Measure("ms_ssim", "MS-SSIM", "", True, 4, "the same over several scales, as many as the size allows"),
    Measure("lpips", "LPIPS", "", False, 4, "learnt perceptual distance (AlexNet)"),
    Measure("latent_change", "latent L1", "", False, 4, "relative L1 distance of the final latents"),
    Measure("temporal_psnr", "temporal PSNR", "dB", True, 1, "PSNR of the changes between neighbouring frames"),
    Measure(
        "motion_ratio", "motion ratio", "", None, 3, "motion energy over the unaccelerated video's; below 1: damped"
    ),
)
CAPTION = ("colour", "count", "direction", "speed")
"""The parts of a caption that the demo model's check judges."""


def ms_ssim(video: Any, reference: Any) -> float:
    """Multi-scale structural similarity (torchmetrics) of (F, H, W, 3) in [0, 1], mean over frames.

    Five scales need more than 160 pixels; smaller pictures get as many as fit, with the weights made to sum to one.
    """
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a, b = (torch.as_tensor(v).float().permute(0, 3, 1, 2) for v in (video, reference))
    if a.shape != b.shape:
        raise ValueError(f"videos differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    side = min(a.shape[-2:])
    window = min(WINDOW, (side - 1) // 2 * 2 + 1)
    # Every scale has to hold the window; torchmetrics itself asks for side > (window - 1) * (n - 1) ** 2.
    count = next(n for n in (5, 4, 3, 2, 1) if side // 2 ** (n - 1) >= window and side // max(1, n - 1) ** 2 >= window)
    weights = STANDARD_SCALES[:count]
    value = multiscale_structural_similarity_index_measure(
        a, b, kernel_size=window, data_range=1.0, betas=tuple(w / sum(weights) for w in weights), normalize="relu"
    )
    return float(value)


def lpips_missing() -> str:
    """Why LPIPS cannot be measured here; empty if it can. Nothing is ever downloaded for it."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        return "LPIPS: not measured: torchvision is not installed"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(folder.glob("alexnet-owt-*.pth")):
        return "LPIPS: not measured: weights not found (AlexNet's, in torch's checkpoint folder; nothing is downloaded)"
    return ""


def lpips_note(videos: Sequence[Mapping[str, float | None]]) -> str:
    """A note on LPIPS for these figures; empty if every video has one."""
    without = sum(figures.get("lpips") is None for figures in videos)
    if not without:
        return ""
    return lpips_missing() or (
        f"LPIPS: not measured for {without} of {len(videos)} videos: smaller than {MIN_LPIPS_SIDE} pixels, or kept "
        "from before its weights were there (another file of results measures it for all)"
    )


_LPIPS: list[Any] = []


def lpips(video: Any, reference: Any) -> float | None:
    """Learnt perceptual distance (AlexNet, torchmetrics) of (F, H, W, 3) in [0, 1], mean over frames.

    ``None`` where it cannot be measured (:func:`lpips_missing`), or frames are too small for AlexNet.
    """
    import torch
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    if lpips_missing() or min(video.shape[1:3]) < MIN_LPIPS_SIDE:
        return None
    if not _LPIPS:
        _LPIPS.append(LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True))
    a, b = (torch.as_tensor(v).float().permute(0, 3, 1, 2).clamp(0, 1) for v in (video, reference))
    metric = _LPIPS[0]
    metric.reset()
    with torch.no_grad():
        for frame in range(len(a)):  # one by one: a long video at full size would take gigabytes
            metric.update(a[frame : frame + 1], b[frame : frame + 1])
        return float(metric.compute())


def latent_change(latents: Any, reference: Any) -> float | None:
    """``sum|a - b| / sum|b|`` of final latents; ``None`` where one is unknown or the shapes differ."""
    if latents is None or reference is None or latents.shape != reference.shape:
        return None
    return float(metrics.relative_change(latents, reference))


def caption_check(video: Any, caption: str | None) -> dict[str, bool] | None:
    """Which parts of a demo caption a video shows; ``None`` for captions of other wording and for short videos."""
    from ..demo import check

    if caption is None:
        return None
    try:
        checked = check.check(video, caption)
    except UnicpError:
        return None  # another wording, fewer than 5 frames, or no SciPy
    return {name: bool(getattr(checked, name)) for name in CAPTION}


def distances(frames: Any, baseline: Any, latents: Any = None, baseline_latents: Any = None) -> dict[str, float | None]:
    """Every figure of :data:`MEASURES` for a video (F, H, W, 3) in [0, 1] against the unaccelerated one.

    ``None`` stands for what could not be measured. An equal video has an infinite PSNR.
    """
    return {
        "psnr": metrics.psnr(frames, baseline),
        "ssim": metrics.ssim(frames, baseline),
        "ms_ssim": ms_ssim(frames, baseline),
        "lpips": lpips(frames, baseline),
        "latent_change": latent_change(latents, baseline_latents),
        "temporal_psnr": metrics.temporal_psnr(frames, baseline),
        "motion_ratio": metrics.motion_ratio(frames, baseline),
    }
