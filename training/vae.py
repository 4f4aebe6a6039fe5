"""Step 1 of training the demo model: the video autoencoder, on crops of the picture over the whole clip.

python -m training.vae            # resumes from training/runs/vae.pt
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import models


def crops(videos: np.ndarray, count: int, rng: np.random.Generator, size: int = 48) -> torch.Tensor:
    """Random crops of the picture, over all frames, as (B, 3, F, H, W) in [-1, 1].

    All frames, because the causal convolutions of late frames look back on more than a short clip holds: trained on
    short clips, the latents drift along a long one.
    """
    picked = []
    for _ in range(count):
        video = videos[rng.integers(len(videos))]
        y, x = (int(rng.integers(limit + 1)) for limit in np.array(video.shape[1:3]) - size)
        picked.append(video[:, y : y + size, x : x + size])
    batch = torch.from_numpy(np.stack(picked)).float() / 127.5 - 1
    return batch.permute(0, 4, 1, 2, 3)


class ConvMuon:
    """Muon for convolutions: every kernel is updated as the matrix (out, in * kt * kh * kw), AdamW for the rest."""

    def __init__(self, module: torch.nn.Module, lr: float) -> None:
        kernels = [p for p in module.parameters() if p.ndim >= 2]
        self.kernels = kernels
        self.matrices = [torch.nn.Parameter(p.detach().view(p.shape[0], -1)) for p in kernels]  # same storage
        rest = [p for p in module.parameters() if p.ndim < 2]
        self.optims = [
            torch.optim.Muon(self.matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, lr: float) -> None:
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view(matrix.shape)
            kernel.grad = None
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = lr
            optim.step()
            optim.zero_grad(set_to_none=True)

    def state_dict(self) -> list[Any]:
        return [optim.state_dict() for optim in self.optims]

    def load_state_dict(self, states: list[Any]) -> None:
        for optim, state in zip(self.optims, states, strict=True):
            optim.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--videos", type=int, default=600)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term, per latent element")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    args = parser.parse_args()

    device = models.pick_device(args.device)
    models.RUNS.mkdir(exist_ok=True)
    checkpoint = models.RUNS / "vae.pt"
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    vae = models.vae().to(device)
    optimizer = ConvMuon(vae, args.lr)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        rng = np.random.default_rng([args.seed, start])
        torch.manual_seed(args.seed + start)
    videos = models.drawn(range(10_000_000, 10_000_000 + args.videos))

    def save(step: int) -> None:
        models.save_atomically(
            {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint
        )

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("vae", total=args.steps, completed=start)
        began = time.time()
        for step in range(start, args.steps):
            lr = args.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            pixels = crops(videos, args.batch, rng).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                posterior = vae.encode(pixels).latent_dist
                mean, logvar = posterior.mean.float(), posterior.logvar.float()
                latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
                rebuilt = vae.decode(latents).sample.float()
            error = rebuilt - pixels
            # The change between frames counts on its own, so that motion stays sharp.
            motion = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
            loss = error.abs().mean() + 0.25 * motion + args.kl * kl
            loss.backward()
            optimizer.step(lr)
            psnr = -10 * math.log10((error.detach() / 2).pow(2).mean().item())
            progress.update(task, advance=1, description=f"vae  PSNR {psnr:5.2f} dB  KL {kl.item():.2f}")
            if (step + 1) % 250 == 0:
                save(step + 1)
                print(
                    f"step {step + 1}: PSNR {psnr:.2f} dB, KL {kl.item():.3f}, {time.time() - began:.0f} s", flush=True
                )
    save(args.steps)


if __name__ == "__main__":
    main()
