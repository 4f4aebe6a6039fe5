"""Stand-ins for models outside of diffusers: their module names, signatures and layouts, everything else plain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Attention(nn.Module):
    """Self-attention of (B, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _CrossAttention(nn.Module):
    """Attention of (B, T, C) to the tokens of all texts in a row, (1, sum of their lengths, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, y: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        k, v = self.kv_linear(y[0]).unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)  # each (H, all, d)
        outputs, first = [], 0
        for query, length in zip(self.q_linear(x).unflatten(-1, (self.heads, -1)), lengths, strict=True):
            here = slice(first, first + length)
            outputs.append(F.scaled_dot_product_attention(query.transpose(0, 1), k[:, here], v[:, here]))
            first += length
        return self.proj(torch.stack(outputs).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = _Attention(width, heads)
        self.cross_attn = _CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):  # type: ignore[no-untyped-def]
        modulation = self.scale_shift_table[None] + t.reshape(len(x), 6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        tokens = (self.norm1(x) * (1 + scale) + shift).unflatten(1, (T, S))  # (B, T, S, C)
        if self.temporal:
            tokens = self.attn(tokens.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), S)).transpose(1, 2)
        else:
            tokens = self.attn(tokens.flatten(0, 1)).unflatten(0, (len(x), T))
        x = x + gate * tokens.flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class STDiT3(nn.Module):
    """Open-Sora 1.2: ``x`` (B, C, F, H, W), ``y`` (B, 1, tokens, width of the text)."""

    def __init__(self, width: int = 24, heads: int = 2, depth: int = 2, channels: int = 4, text: int = 16) -> None:
        super().__init__()
        self.patch_size = (1, 2, 2)
        self.x_embedder = nn.Conv3d(channels, width, self.patch_size, self.patch_size)
        self.t_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU())
        self.t_block = nn.Linear(width, 6 * width)
        self.y_embedder = nn.Linear(text, width)
        self.spatial_blocks = nn.ModuleList([_Block(width, heads, temporal=False) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList([_Block(width, heads, temporal=True) for _ in range(depth)])
        self.proj_out = nn.Linear(width, 4 * channels)

    def forward(self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None):  # type: ignore[no-untyped-def]
        grid = self.x_embedder(x)  # (B, C, F, H/2, W/2)
        frames, rows, columns = grid.shape[2:]
        t = self.t_block(self.t_embedder(timestep[:, None] / 1000))
        lengths = [y.shape[2]] * len(y)
        y = self.y_embedder(y).reshape(1, -1, grid.shape[1])
        x = grid.flatten(2).transpose(1, 2)  # (B, F*S, C)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, y, t, lengths, x_mask, None, frames, rows * columns)
            x = temporal(x, y, t, lengths, x_mask, None, frames, rows * columns)
        x = self.proj_out(x).reshape(len(x), frames, rows, columns, 2, 2, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
