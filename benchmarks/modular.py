"""The demo model in diffusers' modular pipeline for Wan, with a guider of ours: what it does, beside the plain one.

``python -m benchmarks.modular "a red ball bouncing fast over a gray striped background"``

The figures are those of ``unicp generate PROMPT --method budget --compare`` on the ordinary pipeline: the same steps
computed, the same distance to the unaccelerated video.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import ModularPipelineBlocks, WanPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

import unicp
from unicp import demo
from unicp.hosts.guider import FillGuider
from unicp.tensors import metrics

PROMPT = "a red ball bouncing fast over a gray striped background"


def modular(pipe: Any, blocks: type[ModularPipelineBlocks] = WanBlocks) -> Any:
    """The modular pipeline with an ordinary one's components."""
    made = blocks().init_pipeline()
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")}
    made.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=demo.GUIDANCE))
    made.set_progress_bar_config(disable=True)
    return made


def noise(pipe: Any, seed: int) -> torch.Tensor:
    """What the ordinary pipeline begins with at the demo model's size.

    Modular blocks compute a VAE's reduction from its layers, and the demo's VAE reduces by patches, too: they are given
    the latents.
    """
    channels, generator = pipe.transformer.config.in_channels, torch.Generator().manual_seed(seed)
    size = (demo.HEIGHT, demo.WIDTH, demo.FRAMES)
    latents: torch.Tensor = pipe.prepare_latents(1, channels, *size, torch.float32, "cpu", generator)
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--target-speedup", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=demo.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    ordinary = WanPipeline.from_pretrained(demo.path(), dtype=torch.float32)
    pipe = modular(ordinary)

    def frames() -> Any:
        latents = noise(ordinary, args.seed)
        shape = {"height": demo.HEIGHT, "width": demo.WIDTH, "num_frames": demo.FRAMES}
        call = {"num_inference_steps": args.steps, "output_type": "np", **shape}
        return pipe(prompt=args.prompt, latents=latents, output="videos", **call)[0]

    plain = frames()
    config = unicp.BudgetConfig(target_speedup=args.target_speedup)
    pipe.update_components(guider=FillGuider(pipe.guider, config, pipe))
    made = frames()
    print(pipe.guider.report())
    print(f"PSNR {metrics.psnr(made, plain):.1f} dB, SSIM {metrics.ssim(made, plain):.4f} against the plain video")


if __name__ == "__main__":
    main()
