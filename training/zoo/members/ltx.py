"""LTX-Video: self-attention and cross-attention, batched guidance, Euler with a shift that follows the length."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

from training.zoo.data import Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from zoo import parts

PATCH = 2
"""As in LTX-Video, patches are made by the VAE, not by the transformer."""
SHIFT = 2.0
"""Of training; the released scheduler's shift for 252 tokens is nearly that."""
FRAME_RATE = 8


class LTX(Member):
    name = "ltx"
    about = (
        "LTX-Video: self-attention and cross-attention, batched guidance, Euler with a shift that follows the length"
    )

    def modules(self) -> dict[str, Any]:
        transformer = LTXVideoTransformer3DModel(
            in_channels=parts.CHANNELS * PATCH**2,
            out_channels=parts.CHANNELS * PATCH**2,
            num_attention_heads=3,
            attention_head_dim=64,
            cross_attention_dim=192,
            num_layers=8,
            caption_channels=parts.TEXT_DIM,
        )
        return {"transformer": transformer}

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noisy, timestep, velocity = (
            parts.patched(x, PATCH) if x.ndim == 5 else x for x in noised(batch, SHIFT)
        )  # fmt: skip
        frames, height, width = noisy.shape[2:]
        output = modules["transformer"](
            noisy.flatten(2).transpose(1, 2),  # (B, F * H * W, C)
            batch.text,
            timestep,
            batch.mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(parts.TEMPORAL / FRAME_RATE, parts.SPATIAL * PATCH, parts.SPATIAL * PATCH),
            return_dict=False,
        )[0]
        return (output.float() - velocity.flatten(2).transpose(1, 2)).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        pipe = LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_image_seq_len=1024,
                max_image_seq_len=4096,
                base_shift=0.95,
                max_shift=2.05,
                shift_terminal=0.1,
            ),
            vae=parts.decoder(PATCH),
            text_encoder=parts.text_encoder(),
            tokenizer=parts.tokenizer(),
            transformer=modules["transformer"],
        )
        return parts.without_progress_bar(pipe)

    def call(self) -> dict[str, Any]:
        return {**super().call(), "frame_rate": FRAME_RATE}


MEMBER = LTX()
