"""Draw the training videos, encode them once with the demo's VAE, and keep the latents.

    python -m training.zoo.data latte        # what this member is trained on; adds what is missing to $UNICP_ZOO_RUNS

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
class Kind:
    """A set of videos.

    Attributes:
        prefix: its files are ``<prefix>-<first seed>.pt``.
        count: how many videos; a multiple of ``CHUNK``.
        size: height and width in pixels.
        cost: arithmetic of one video, in videos of the usual size.
        first_frame: keep the latents of the first frame followed by gray ones, too.
    """

    prefix: str
    count: int
    size: tuple[int, int] = (parts.HEIGHT, parts.WIDTH)
    cost: int = 1
    first_frame: bool = False


KINDS = {
    "video": Kind(prefix="latents", count=6000),
    "large": Kind(prefix="large", count=1000, size=(2 * parts.HEIGHT, 2 * parts.WIDTH), cost=4),
    "image": Kind(prefix="image", count=2000, first_frame=True),
}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a training step sees.

    Attributes:
        latents: clean latents (B, C, F, H, W).
        text, mask: embeddings of captions (B, L, C), zeros after the last word, and which of them are words (B, L).
        empty_text, empty_mask: those of the empty caption, (1, L, C) and (1, L).
        first_frame: latents (B, C, F, H, W) of the first frame followed by gray ones; None where no member asks.
        generator: draws noise and noise levels.
    """

    latents: torch.Tensor
    text: torch.Tensor
    mask: torch.Tensor
    empty_text: torch.Tensor
    empty_mask: torch.Tensor
    first_frame: torch.Tensor | None
    generator: torch.Generator

    def noise(self) -> torch.Tensor:
        return torch.randn(self.latents.shape, generator=self.generator)


class Data:
    """The chunks of latents that there are, and the embeddings of their captions."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.tokenizer, self.text_encoder = parts.tokenizer(), parts.text_encoder()
        self.empty_text, self.empty_mask = self._embed([""])
        self.tensors: dict[str, torch.Tensor] = {}
        self.known: set[Path] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self.tensors["latents"]) if self.tensors else 0

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.tokenizer(captions, padding="max_length", max_length=parts.TEXT_LENGTH, return_tensors="pt")
        if words.input_ids.shape[1] > parts.TEXT_LENGTH:
            raise SystemExit(f"a caption has more than {parts.TEXT_LENGTH} tokens")
        return self.text_encoder(words.input_ids, words.attention_mask).last_hidden_state, words.attention_mask

    def refresh(self) -> None:
        """Load the chunks that have been added."""
        for path in sorted(RUNS.glob(f"{self.kind.prefix}-*.pt")):
            if path not in self.known:
                chunk = torch.load(path)
                chunk["text"], chunk["mask"] = self._embed(chunk.pop("captions"))
                known = self.tensors
                self.tensors = {key: torch.cat([known[key], new]) if known else new for key, new in chunk.items()}
                self.known.add(path)

    def batch(self, size: int, caption_dropout: float, generator: torch.Generator) -> Batch:
        rows = torch.randint(len(self), (size,), generator=generator)
        chosen = {key: tensor[rows] for key, tensor in self.tensors.items()}
        dropped = torch.rand(size, generator=generator) < caption_dropout
        text = torch.where(dropped[:, None, None], self.empty_text, chosen["text"])
        mask = torch.where(dropped[:, None], self.empty_mask, chosen["mask"])
        return Batch(
            latents=chosen["latents"].float(),
            text=text,
            mask=mask,
            empty_text=self.empty_text,
            empty_mask=self.empty_mask,
            first_frame=chosen["first_frame"].float() if "first_frame" in chosen else None,
            generator=generator,
        )


def encode(vae: torch.nn.Module, kind: Kind, first: int, batch: int) -> dict[str, object]:
    """Captions and latents of the scenes with these seeds."""
    shape = (1, -1, 1, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)

    def latents_of(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            encoded = vae.encode(pixels).latent_dist.mean.float()
        return ((encoded - mean) / std).half()

    captions: list[str] = []
    latents, first_frames = [], []
    for begin in range(first, first + CHUNK, batch):
        drawn = [scenes.sample_scene(seed) for seed in range(begin, min(begin + batch, first + CHUNK))]
        size = {"frames": parts.FRAMES, "height": kind.size[0], "width": kind.size[1]}
        pixels = torch.stack([torch.from_numpy(scenes.render(scene, **size)) for scene in drawn])
        pixels = pixels.permute(0, 4, 1, 2, 3) * 2 - 1  # (B, 3, F, H, W)
        latents.append(latents_of(pixels))
        captions += [scene.caption() for scene in drawn]
        if kind.first_frame:
            pixels[:, :, 1:] = 0
            first_frames.append(latents_of(pixels))
    more = {"first_frame": torch.cat(first_frames)} if first_frames else {}
    return {"captions": captions, "latents": torch.cat(latents), **more}


@torch.inference_mode()
def main() -> None:
    from training.zoo.members import NAMES, member

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("member", choices=NAMES)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    RUNS.mkdir(parents=True, exist_ok=True)
    vae = parts.vae()
    for kind in (KINDS[name] for name in member(args.member).data):
        for first in range(0, kind.count, CHUNK):
            path = RUNS / f"{kind.prefix}-{first:06d}.pt"
            if not path.exists():
                began = time.time()
                save_atomically(encode(vae, kind, first, args.batch), path)
                rate = CHUNK / (time.time() - began)
                print(f"{first + CHUNK} of {kind.count} {kind.prefix}, {rate:.1f} a second", flush=True)


if __name__ == "__main__":
    main()
