"""What the members that are fine-tuned from the demo model share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel

from training import models
from training.transformer import PaddedCrossAttention
from training.zoo.member import Modules
from unicp import demo
from zoo import parts


def transformer(*, blocks: tuple[int, ...] | None = None, more_channels: int = 0) -> Any:
    """The demo's transformer: with some of its blocks only, or with further input channels that begin as unused."""
    trained = WanTransformer3DModel.from_pretrained(demo.path() / "transformer", dtype=torch.float32)
    weights = trained.state_dict()
    settings = {name: value for name, value in trained.config.items() if name != "_name_or_path"}
    if blocks is not None:
        kept = {f"blocks.{old}.": f"blocks.{new}." for new, old in enumerate(blocks)}
        weights = {
            next((new + key.removeprefix(old) for old, new in kept.items() if key.startswith(old)), key): value
            for key, value in weights.items()
            if not key.startswith("blocks.") or key.startswith(tuple(kept))
        }
    if more_channels:
        old = weights["patch_embedding.weight"]  # (C, channels, 1, 2, 2)
        weights["patch_embedding.weight"] = torch.cat([old, old.new_zeros(len(old), more_channels, *old.shape[2:])], 1)
    model = WanTransformer3DModel.from_config(
        settings,
        in_channels=parts.CHANNELS + more_channels,
        num_layers=len(blocks or trained.blocks),
    )
    model.load_state_dict(weights)
    return model


def shortened(modules: Modules) -> Modules:
    """Give the denoisers the cross-attention with which the demo was trained."""
    for module in modules.values():
        for block in module.blocks:
            block.attn2.set_processor(PaddedCrossAttention())
    return modules


def components() -> dict[str, Any]:
    """The rest of a Wan pipeline."""
    return {
        "tokenizer": parts.tokenizer(),
        "text_encoder": parts.text_encoder(),
        "vae": parts.vae(),
        "scheduler": models.scheduler(),
    }


def call(usual: dict[str, Any]) -> dict[str, Any]:
    """The demo was trained with prompts padded to the pipeline's own length."""
    return {key: value for key, value in usual.items() if key != "max_sequence_length"}
