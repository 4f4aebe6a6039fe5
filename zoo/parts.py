"""What all members share: the demo's tokenizer, its text encoder and its decoder, as every pipeline can call them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput
from transformers import AutoTokenizer, UMT5EncoderModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from unicp import demo

HEIGHT, WIDTH, FRAMES = demo.HEIGHT, demo.WIDTH, demo.FRAMES
CHANNELS = 8
TEXT_LENGTH, TEXT_DIM = 32, 128
SPATIAL, TEMPORAL = 8, 2
"""Pixels and frames for each latent one."""
LATENT_FRAMES = (FRAMES - 1) // TEMPORAL + 1


class TextEncoder(torch.nn.Module):
    """The demo's text encoder. It masks padding even if a pipeline passes no mask, and returns zeros there.

    Pipelines ask for the last hidden state, for an earlier one or for a pooled vector: all three are the same text,
    the last one as the mean over its words.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Any:
        mask = (input_ids != self.config.pad_token_id) if attention_mask is None else attention_mask
        mask = mask.to(input_ids.dtype)
        text = self.model(input_ids, mask).last_hidden_state * mask[..., None]  # (B, L, C)
        pooled = text.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return BaseModelOutputWithPooling(last_hidden_state=text, hidden_states=(text,) * 3, pooler_output=pooled)


class Decoder(torch.nn.Module):
    """The demo's VAE for pipelines of other families: it takes latents as a member makes them, with mean 0 and std 1.

    With ``patch=2``, the channels of 2 x 2 latents are those of one, for transformers that make no patches.
    The attributes and the entries of ``config`` are what those pipelines read of their own VAEs.
    """

    def __init__(self, vae: Any, patch: int = 1) -> None:
        super().__init__()
        self.vae = vae
        self.patch = patch
        self.spatial_compression_ratio, self.temporal_compression_ratio = SPATIAL * patch, TEMPORAL
        channels = CHANNELS * patch**2
        self.config = SimpleNamespace(
            block_out_channels=(1,) * 4,  # 2 ** (4 - 1) pixels for each latent one
            latent_channels=channels,
            scaling_factor=1.0,
            shift_factor=None,
            temporal_compression_ratio=TEMPORAL,
            timestep_conditioning=False,
        )
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        shape = (1, -1, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape))
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def forward(self, latents: torch.Tensor) -> Any:
        return self.decode(latents)

    def decode(self, latents: torch.Tensor, *_: Any, return_dict: bool = True, **__: Any) -> Any:
        """Latents (B, C, F, H, W) to pixels (B, 3, F, H, W) in [-1, 1]."""
        latents = unpatched(latents, self.patch)
        pixels = self.vae.decode(latents * self.std + self.mean, return_dict=False)[0]
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def patched(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, F, H, W) to (B, C * patch * patch, F, H / patch, W / patch)."""
    size = len(latents)
    frames = torch.nn.functional.pixel_unshuffle(latents.transpose(1, 2).flatten(0, 1), patch)
    return frames.unflatten(0, (size, -1)).transpose(1, 2)


def unpatched(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """Undo :func:`patched`."""
    size = len(latents)
    frames = torch.nn.functional.pixel_shuffle(latents.transpose(1, 2).flatten(0, 1), patch)
    return frames.unflatten(0, (size, -1)).transpose(1, 2)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.path() / "tokenizer")


def text_encoder() -> TextEncoder:
    model = UMT5EncoderModel.from_pretrained(demo.path() / "text_encoder", dtype=torch.float32)
    return TextEncoder(model).eval().requires_grad_(False)


def vae() -> Any:
    model = AutoencoderKLWan.from_pretrained(demo.path() / "vae", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def decoder(patch: int = 1) -> Decoder:
    return Decoder(vae(), patch).eval()


def without_progress_bar(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
