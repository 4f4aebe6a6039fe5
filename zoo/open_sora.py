"""Open-Sora 1.2, which diffusers does not have: its transformer at a small size, and a pipeline that samples from it.

Module names, signatures and the order of computation are those of STDiT3: spatial and temporal blocks alternate, each
with self-attention (queries and keys normalised; rotary positions in time), cross-attention and an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import nn


def _waves(positions: torch.Tensor, channels: int, longest: float = 10_000.0) -> torch.Tensor:
    """Sines and cosines of positions (N,), as (N, channels)."""
    rates = torch.exp(-math.log(longest) * torch.arange(channels // 2, device=positions.device) / (channels // 2))
    angles = positions.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions along the tokens of (B, H, T, d)."""
    waves = _waves(torch.arange(x.shape[2], device=x.device), x.shape[3])
    sin, cos = waves.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Self-attention of (B, T, C)."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rotary:
            q, k = _rotated(q), _rotated(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of (B, T, C) to text (B, L, C); ``mask`` (B, L) is true at words."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        words = None if mask is None else mask.bool()[:, None, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, words).transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    """A block over the tokens of one frame at a time, or over the frames of one place at a time."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads, rotary=temporal)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        inner = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        t: torch.Tensor,
        mask: torch.Tensor | None = None,
        x_mask: torch.Tensor | None = None,
        t0: torch.Tensor | None = None,
        T: int = 1,
        S: int = 1,
    ) -> torch.Tensor:
        modulation = self.scale_shift_table[None] + t.unflatten(1, (6, -1))
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)  # each (B, 1, C)
        tokens = (self.norm1(x) * (1 + scale) + shift).unflatten(1, (T, S))  # (B, T, S, C)
        if self.temporal:
            tokens = self.attn(tokens.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), S)).transpose(1, 2)
        else:
            tokens = self.attn(tokens.flatten(0, 1)).unflatten(0, (len(x), T))
        x = x + gate * tokens.flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class STDiT3(ModelMixin, ConfigMixin):
    """Velocity of latents ``x`` (B, C, F, H, W) at ``timestep`` in [0, 1000], given text ``y`` (B, 1, L, C)."""

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 192,
        num_heads: int = 3,
        depth: int = 4,
        mlp_ratio: float = 4.0,
        in_channels: int = 8,
        caption_channels: int = 128,
    ) -> None:
        super().__init__()
        width = hidden_size
        self.patch_size = (1, 2, 2)
        self.x_embedder = nn.Conv3d(in_channels, width, self.patch_size, self.patch_size)
        self.t_embedder = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Sequential(
            nn.Linear(caption_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.spatial_blocks = nn.ModuleList(
            [STDiT3Block(width, num_heads, mlp_ratio, temporal=False) for _ in range(depth)]
        )
        self.temporal_blocks = nn.ModuleList(
            [STDiT3Block(width, num_heads, mlp_ratio, temporal=True) for _ in range(depth)]
        )
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, 4 * in_channels)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        y: torch.Tensor,
        mask: torch.Tensor | None = None,
        x_mask: torch.Tensor | None = None,
        fps: torch.Tensor | None = None,
        height: torch.Tensor | None = None,
        width: torch.Tensor | None = None,
    ) -> torch.Tensor:
        grid = self.x_embedder(x)  # (B, C, F, H/2, W/2)
        channels, frames, rows, columns = grid.shape[1:]
        down = _waves(torch.arange(rows, device=x.device), channels // 2)[:, None].expand(-1, columns, -1)
        across = _waves(torch.arange(columns, device=x.device), channels // 2)[None].expand(rows, -1, -1)
        places = torch.cat([down, across], dim=-1).flatten(0, 1)  # (S, C)
        tokens = grid.flatten(3).permute(0, 2, 3, 1) + places.to(grid.dtype)
        hidden = tokens.flatten(1, 2)  # (B, F*S, C)
        t = self.t_embedder(_waves(timestep, 256).to(x.dtype))
        modulation = self.t_block(t)
        text = self.y_embedder(y.squeeze(1))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            hidden = spatial(hidden, text, modulation, mask, x_mask, None, frames, rows * columns)
            hidden = temporal(hidden, text, modulation, mask, x_mask, None, frames, rows * columns)
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        hidden = self.proj_out(self.norm_final(hidden) * (1 + scale) + shift)
        patches = hidden.unflatten(1, (frames, rows, columns)).unflatten(-1, (2, 2, -1))  # (B, F, H/2, W/2, 2, 2, C)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class OpenSoraPipeline(DiffusionPipeline):
    """Text to video with STDiT3: rectified flow, both branches of guidance in one batch."""

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        self.video_processor = VideoProcessor(vae_scale_factor=vae.spatial_compression_ratio)

    def _embedded(self, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = words.input_ids.to(self._execution_device), words.attention_mask.to(self._execution_device)
        return self.text_encoder(ids, mask).last_hidden_state, mask

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str = "",
        *,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 32,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Any:
        self._interrupt = False
        prompts = [prompt] if isinstance(prompt, str) else prompt
        guided = guidance_scale > 1
        text, mask = self._embedded(prompts + ([negative_prompt] * len(prompts) if guided else []), max_sequence_length)
        spatial, temporal = self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio
        shape = (len(prompts), self.transformer.config.in_channels, (num_frames - 1) // temporal + 1)
        if latents is None:
            shape = (*shape, height // spatial, width // spatial)
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=text.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        with self.progress_bar(total=num_inference_steps) as bar:
            for index, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                rows = torch.cat([latents] * 2) if guided else latents
                velocity = self.transformer(rows, timestep.expand(len(rows)), text[:, None], mask=mask)
                if guided:
                    cond, uncond = velocity.chunk(2)
                    velocity = uncond + guidance_scale * (cond - uncond)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, index, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        if output_type != "latent":
            pixels = self.vae.decode(latents).sample
            return SimpleNamespace(frames=self.video_processor.postprocess_video(pixels, output_type=output_type))
        return SimpleNamespace(frames=latents)
