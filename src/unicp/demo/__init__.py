"""The demo model: a small Wan text-to-video pipeline in the ordinary diffusers folder layout.

It was trained by ``training/`` on the procedurally drawn videos of :mod:`unicp.demo.scenes`.
"""

from __future__ import annotations

from pathlib import Path

from .scenes import prompts as prompts

HEIGHT, WIDTH, FRAMES, STEPS = 96, 96, 13, 50
"""Height and width in pixels, frames, and denoising steps for which the model was trained."""
GUIDANCE = 4.0
FPS = 8


def path() -> Path:
    """The folder to give to ``WanPipeline.from_pretrained``."""
    return Path(__file__).parent / "model"
