"""What the tiny pipelines of the secondary families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from tests.family import Family, lively, part, quiet

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
CHANNELS = {"in_channels": 4, "out_channels": 4}
WAN = {**HEADS, **CHANNELS, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
HUNYUAN = {**HEADS, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4)}
WITHOUT = dict.fromkeys(("tokenizer", "text_encoder", "vae"))


def model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return lively(part(name)(**config).eval())


def pipeline(name: str, transformer: Any, scheduler: Any = None, **parts: Any) -> Any:
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    return quiet(part(name)(transformer=transformer, scheduler=scheduler, **{**WITHOUT, **parts}))


def like(latents: torch.Tensor, *shape: int) -> torch.Tensor:
    """The same noise at every call, for each sample."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)).expand(len(latents), *shape)


def text_inputs(latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": embeds,
        "return_dict": False,
    }


def family(name: str, build: Callable[[], Any], **fields: Any) -> Family:
    defaults: dict[str, Any] = {
        "call": lambda frames, prompts: {"num_frames": frames},
        "size": 32,
        "frames": 9,
        "other": {"size": {"size": 64}, "frames": {"frames": 5}},
        "width": 24,
        "branches": ("call 1", "call 2"),
        "rows": 1,
        "blocks": lambda denoiser: list(denoiser.transformer_blocks),
        "entrance": "patch_embed",
        "kinds": ("self_attention", "cross_attention", "mlp", "block"),
    }
    return Family(name=name, build=build, **{**defaults, **fields})


CONTEXTS = {"branches": ("cond", "uncond")}
GUIDER = {"branches": ("pred_cond", "pred_uncond"), "guide": None}
BATCHED = {"branches": ("call 1",), "rows": 2}
JOINT = {"streams": 2, "kinds": ("self_attention", "mlp", "block")}
NO_TEXT = {"negative_prompt": None}
