"""Step 2: draw the training videos, encode them once, and keep the latents.

python -m training.latents --count 8000      # adds what is missing to training/runs/latents-*.pt
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import models
from unicp.demo import scenes

CHUNK = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12000, help=f"videos; a multiple of {CHUNK}")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--device")
    args = parser.parse_args()

    device = models.pick_device(args.device)
    vae = models.vae().to(device).eval()
    vae.load_state_dict(torch.load(models.RUNS / "vae.pt", map_location=device)["model"])
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, torch.inference_mode():
        task = progress.add_task("encoding", total=args.count)
        for first in range(0, args.count, CHUNK):
            path = models.RUNS / f"latents-{first:06d}.pt"
            if not path.exists():
                captions, latents = [], []
                for begin in range(first, first + CHUNK, args.batch):
                    drawn = [scenes.sample_scene(seed) for seed in range(begin, begin + args.batch)]
                    pixels = torch.stack(
                        [torch.from_numpy(scenes.render(scene, frames=models.FRAMES)) for scene in drawn]
                    )
                    pixels = pixels.permute(0, 4, 1, 2, 3).to(device) * 2 - 1
                    with torch.autocast(device.type, torch.bfloat16):
                        latents.append(vae.encode(pixels).latent_dist.mean.half().cpu())
                    captions += [scene.caption() for scene in drawn]
                    progress.update(task, completed=begin)
                models.save_atomically({"captions": captions, "latents": torch.cat(latents)}, path)
            progress.update(task, completed=first + CHUNK)


if __name__ == "__main__":
    main()
