"""Step 3: the text encoder and the transformer, together, by flow matching on the latents.

    python -m training.transformer --steps 6000      # resumes from training/runs/transformer.pt

The learning rate warms up, stays, and falls linearly to zero over the last ``--decay`` steps. A run may be
stopped at any time and resumed with another ``--steps``: only the fall depends on it.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import models

REAL_TOKENS = 32


class PaddedCrossAttention:
    """Cross-attention over 32 text tokens that equals Wan's over 512.

    WanPipeline pads the text to 512 tokens of zeros and masks none of them, so every padding token has the same
    key and value. 480 of them are folded into one, whose logit is raised by the logarithm of their number.
    """

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        bias = query.new_zeros(1, 1, 1, REAL_TOKENS)
        bias[..., -1] = math.log(1 + models.TEXT_LENGTH - REAL_TOKENS)
        out = F.scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, bias.to(value.dtype))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class Denoiser(torch.nn.Module):
    """Text encoder and transformer as WanPipeline joins them: text padded with zeros after the last word."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder(vocab_size)
        self.transformer = models.transformer()
        for block in self.transformer.blocks:
            block.attn2.set_processor(PaddedCrossAttention())

    def forward(self, latents: Any, timestep: Any, ids: Any, mask: Any) -> Any:
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(latents, timestep, text, return_dict=False)[0]


def optimizers(model: Denoiser, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--decay", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device")
    args = parser.parse_args()

    device = models.pick_device(args.device)
    tokenizer = models.tokenizer()
    torch.manual_seed(args.seed)
    model = Denoiser(len(tokenizer)).to(device)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optims = optimizers(model, args.lr)
    checkpoint = models.RUNS / "transformer.pt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        average = state["average"]
        for optim, saved in zip(optims, state["optimizers"], strict=True):
            optim.load_state_dict(saved)
        start = state["step"]
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + start)

    chunks = [torch.load(path) for path in sorted(models.RUNS.glob("latents-*.pt"))]
    latents = torch.cat([chunk["latents"] for chunk in chunks])
    captions = [caption for chunk in chunks for caption in chunk["captions"]] + [""]
    # The statistics come from the first chunk alone, so that they stay when more videos are added.
    first = chunks[0]["latents"].float()
    mean, std = first.mean((0, 2, 3, 4)), first.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    words = tokenizer(captions, padding="max_length", max_length=REAL_TOKENS, return_tensors="pt")
    if int(words.attention_mask.sum(1).max()) >= REAL_TOKENS:
        raise SystemExit(f"a caption has {REAL_TOKENS} tokens or more; the last token must be padding")

    def save(step: int) -> None:
        models.save_atomically(
            {
                "model": model.state_dict(),
                "average": average,
                "optimizers": [optim.state_dict() for optim in optims],
                "step": step,
                "latents_mean": mean.tolist(),
                "latents_std": std.tolist(),
            },
            checkpoint,
        )

    forward = torch.compile(model) if args.compile else model
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    smooth, began = 0.0, time.time()
    with Progress(*columns) as progress:
        task = progress.add_task("transformer", total=args.steps, completed=start)
        for step in range(start, args.steps):
            lr = args.lr * min(1.0, (step + 1) / 150, (args.steps - step) / args.decay)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = lr
            rows = torch.randint(len(latents), (args.batch,), generator=generator)
            dropped = torch.rand(args.batch, generator=generator) < args.caption_dropout
            text = torch.where(dropped, torch.tensor(len(captions) - 1), rows)
            clean = ((latents[rows].float() - mean.view(shape)) / std.view(shape)).to(device)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            sigma = torch.sigmoid(torch.randn(args.batch, generator=generator))
            sigma = models.FLOW_SHIFT * sigma / (1 + (models.FLOW_SHIFT - 1) * sigma)
            level = sigma.to(device).view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * clean + level * noise
            with torch.autocast(device.type, torch.bfloat16):
                velocity = forward(
                    noisy, (sigma * 1000).to(device), words.input_ids[text].to(device),
                    words.attention_mask[text].to(device),
                )  # fmt: skip
            loss = (velocity.float() - (noise - clean)).pow(2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            decay = min(args.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - decay)
            smooth += (loss.item() - smooth) / min(step - start + 1, 100)
            progress.update(task, advance=1, description=f"transformer  loss {smooth:.4f}")
            if (step + 1) % 25 == 0:
                rate = (step + 1 - start) * args.batch / (time.time() - began)
                print(f"step {step + 1}: loss {smooth:.4f}, {rate:.1f} samples/s", flush=True)
            if (step + 1) % 250 == 0:
                save(step + 1)
    save(args.steps)


if __name__ == "__main__":
    main()
