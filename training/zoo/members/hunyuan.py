"""HunyuanVideo: dual-stream blocks, then single-stream ones, embedded guidance (no second branch), Euler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from training.zoo.data import Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from zoo import parts

SHIFT = 3.0
GUIDED = 0.25
"""Share of a batch that learns the velocity under guidance."""
STRONGEST = 6.0


class Hunyuan(Member):
    name = "hunyuan"
    about = "HunyuanVideo: dual-stream and single-stream blocks, embedded guidance (no second branch), Euler"
    blocks = ("transformer_blocks", "single_transformer_blocks")

    def modules(self) -> dict[str, Any]:
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=parts.CHANNELS,
            out_channels=parts.CHANNELS,
            num_attention_heads=3,
            attention_head_dim=64,
            num_layers=2,
            num_single_layers=6,
            num_refiner_layers=1,
            mlp_ratio=3.0,
            patch_size=2,
            text_embed_dim=parts.TEXT_DIM,
            pooled_projection_dim=parts.TEXT_DIM,
            rope_axes_dim=(16, 24, 24),
        )
        return {"transformer": transformer}

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        """Flow matching; part of the batch learns the velocity that classifier-free guidance would make.

        With guidance w the target is u + (w - 1) (v(caption) - v("")), where u is the target of flow matching and both
        velocities are the model's own without guidance (w = 1), which the other part of the batch trains.
        """
        noisy, timestep, target = noised(batch, SHIFT)
        size = len(noisy)
        guided = slice(size - round(GUIDED * size), size)
        guidance = torch.ones(size)
        guidance[guided] += (STRONGEST - 1) * torch.rand(guidance[guided].shape, generator=batch.generator)

        def velocity(rows: slice, text: Any, mask: Any, guidance: Any) -> torch.Tensor:
            return modules["transformer"](
                noisy[rows], timestep[rows], text, mask,
                pooled_projections=text.sum(1) / mask.sum(1, keepdim=True),
                guidance=guidance * 1000,
                return_dict=False,
            )[0].float()  # fmt: skip

        with torch.no_grad():
            one = torch.ones(len(guidance[guided]))
            empty = (batch.empty_text.expand(len(one), -1, -1), batch.empty_mask.expand(len(one), -1))
            difference = velocity(guided, batch.text[guided], batch.mask[guided], one) - velocity(guided, *empty, one)
        target = target.clone()
        target[guided] += (guidance[guided] - 1).view(-1, 1, 1, 1, 1) * difference
        error = (velocity(slice(None), batch.text, batch.mask, guidance) - target).pow(2)
        # Guided targets are longer: divided by the guidance they weigh what the others do.
        return (error / guidance.view(-1, 1, 1, 1, 1)).mean()

    def pipeline(self, modules: Modules) -> Any:
        tokenizer, text_encoder = parts.tokenizer(), parts.text_encoder()
        pipe = HunyuanVideoPipeline(
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=modules["transformer"],
            vae=parts.decoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
            text_encoder_2=text_encoder,
            tokenizer_2=tokenizer,
        )
        return parts.without_progress_bar(pipe)

    def call(self) -> dict[str, Any]:
        return {**super().call(), "prompt_template": {"template": "{}", "crop_start": 0}}


MEMBER = Hunyuan()
