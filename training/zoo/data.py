"""Draw the training videos, encode them once with the demo's VAE, and keep the latents.

    python -m training.zoo.data --count 6000       # adds what is missing to $UNICP_ZOO_RUNS/latents-*.pt

Latents are stored as members see them, with mean 0 and standard deviation 1 in each channel. Training takes whatever
chunks there are, so that it can begin while later ones are still being encoded.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from training.models import save_atomically
from unicp.demo import scenes
from zoo import parts

RUNS = Path(os.environ.get("UNICP_ZOO_RUNS") or Path(__file__).parent.parent / "runs" / "zoo")
CHUNK = 250


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a training step sees.

    Attributes:
        latents: clean latents (B, C, F, H, W).
        text, mask: embeddings of captions (B, L, C), zeros after the last word, and which of them are words (B, L).
        empty_text, empty_mask: those of the empty caption, (1, L, C) and (1, L).
        generator: draws noise and noise levels.
    """

    latents: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    empty_text: torch.Tensor
    empty_mask: torch.Tensor
    generator: torch.Generator

    def noise(self) -> torch.Tensor:
        return torch.randn(self.latents.shape, generator=self.generator)


class Data:
    """The chunks of latents that there are, and the embeddings of their captions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer, self.text_encoder = parts.tokenizer(), parts.text_encoder()
        self.empty_text, self.empty_mask = self._embed([""])
        self.latents, self.text, self.mask = torch.empty(0), torch.empty(0), torch.empty(0)
        self.known: set[Path] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self.latents)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.tokenizer(captions, padding="max_length", max_length=parts.TEXT_LENGTH, return_tensors="pt")
        if words.input_ids.shape[1] > parts.TEXT_LENGTH:
            raise SystemExit(f"a caption has more than {parts.TEXT_LENGTH} tokens")
        return self.text_encoder(words.input_ids, words.attention_mask).last_hidden_state, words.attention_mask

    def refresh(self) -> None:
        """Load the chunks that have been added."""
        paths = [path for path in sorted(self.folder.glob("latents-*.pt")) if path not in self.known]
        for path in paths:
            chunk = torch.load(path)
            text, mask = self._embed(chunk["captions"])
            self.latents = torch.cat([self.latents, chunk["latents"]]) if self.known else chunk["latents"]
            self.text = torch.cat([self.text, text]) if self.known else text
            self.mask = torch.cat([self.mask, mask]) if self.known else mask
            self.known.add(path)

    def batch(self, size: int, caption_dropout: float, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(self), (size,), generator=generator)
        text, mask = self.text[rows], self.mask[rows]
        dropped = torch.rand(size, generator=generator) < caption_dropout
        text = torch.where(dropped[:, None, None], self.empty_text, text)
        mask = torch.where(dropped[:, None], self.empty_mask, mask)
        return Batch(
            latents=self.latents[rows].float(),
            text=text,
            mask=mask,
            empty_text=self.empty_text,
            empty_mask=self.empty_mask,
            generator=generator,
        )


def encode(vae: torch.nn.Module, first: int, batch: int) -> dict[str, object]:
    """Captions and latents of the scenes with these seeds."""
    shape = (1, -1, 1, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
    captions: list[str] = []
    latents = []
    for begin in range(first, first + CHUNK, batch):
        drawn = [scenes.sample_scene(seed) for seed in range(begin, min(begin + batch, first + CHUNK))]
        size = {"frames": parts.FRAMES, "height": parts.HEIGHT, "width": parts.WIDTH}
        pixels = torch.stack([torch.from_numpy(scenes.render(scene, **size)) for scene in drawn])
        pixels = pixels.permute(0, 4, 1, 2, 3) * 2 - 1  # (B, 3, F, H, W)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(pixels).latent_dist.mean.float()
        latents.append(((encoded - mean) / std).half())
        captions += [scene.caption() for scene in drawn]
    return {"captions": captions, "latents": torch.cat(latents)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=6000, help=f"videos; a multiple of {CHUNK}")
    parser.add_argument("--batch", type=int, default=10)
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    vae = parts.vae()
    for first in range(0, args.count, CHUNK):
        path = RUNS / f"latents-{first:06d}.pt"
        if not path.exists():
            began = time.time()
            save_atomically(encode(vae, first, args.batch), path)
            print(f"{first + CHUNK} videos, {CHUNK / (time.time() - began):.1f} a second", flush=True)


if __name__ == "__main__":
    main()
