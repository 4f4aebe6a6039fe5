"""Step 3: the VAE's decoder again, on whole videos, with the encoder and its latents as they are.

    python -m training.decoder            # training/runs/vae.pt -> training/runs/vae-final.pt; resumes

Step 1 sees clips of 5 frames, which is fast; but the causal convolutions of later frames look back on more than that.
Here the decoder learns all 17 frames, from the cached latents with a little noise, as a denoiser leaves them.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import models
from training.vae import ConvMuon

SCALE = 4  # pixels of a latent's side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--videos", type=int, default=500)
    parser.add_argument("--size", type=int, default=12, help="side of the crop, in latents")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise", type=float, default=0.04, help="in standard deviations of the latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    args = parser.parse_args()

    device = models.pick_device(args.device)
    vae = models.vae().to(device)
    vae.load_state_dict(torch.load(models.RUNS / "vae.pt", map_location=device)["model"])
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    decoder = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv])
    optimizer = ConvMuon(decoder, args.lr)
    checkpoint = models.RUNS / "vae-final.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    torch.manual_seed(args.seed + start)
    rng = np.random.default_rng([args.seed, start])
    latents = torch.load(sorted(models.RUNS.glob("latents-*.pt"))[0])["latents"][: args.videos].float()
    std = latents.std((0, 2, 3, 4)).view(1, -1, 1, 1, 1)
    videos = models.drawn(range(args.videos))

    def save(step: int) -> None:
        models.save_atomically(
            {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, checkpoint
        )

    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    smooth, began = 0.0, time.time()
    with Progress(*columns) as progress:
        task = progress.add_task("decoder", total=args.steps, completed=start)
        for step in range(start, args.steps):
            lr = args.lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            coded, wanted = [], []
            for _ in range(args.batch):
                index = int(rng.integers(len(latents)))
                y, x = rng.integers(latents.shape[3] - args.size + 1, size=2)
                coded.append(latents[index, :, :, y : y + args.size, x : x + args.size])
                rows, columns_ = (slice(k * SCALE, (k + args.size) * SCALE) for k in (y, x))
                wanted.append(torch.from_numpy(videos[index, :, rows, columns_]))
            code = torch.stack(coded)
            code = (code + args.noise * std * torch.randn(code.shape)).to(device)
            pixels = (torch.stack(wanted).float() / 127.5 - 1).permute(0, 4, 1, 2, 3).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                rebuilt = vae.decode(code).sample
            error = rebuilt.float() - pixels
            motion = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
            loss = error.abs().mean() + 0.25 * motion
            loss.backward()
            optimizer.step(lr)
            psnr = -10 * math.log10((error.detach() / 2).pow(2).mean().item())
            smooth += (psnr - smooth) / min(step - start + 1, 30)
            progress.update(task, advance=1, description=f"decoder  PSNR {smooth:5.2f} dB")
            if (step + 1) % 50 == 0:
                print(f"step {step + 1}: PSNR {smooth:.2f} dB, {time.time() - began:.0f} s", flush=True)
            if (step + 1) % 300 == 0:
                save(step + 1)
    save(args.steps)


if __name__ == "__main__":
    main()
