"""Latte: spatial and temporal blocks alternate, noise prediction over 1,000 timesteps, DDIM, batched guidance."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from training.zoo.data import Batch
from training.zoo.member import Member, Modules
from zoo import parts

PADDED = 120
"""Tokens to which the pipeline pads every prompt, unless it is told to mask them."""


class Latte(Member):
    name = "latte"
    about = "Latte: alternating spatial and temporal blocks, noise prediction, DDIM, batched guidance"
    blocks = ("transformer_blocks", "temporal_transformer_blocks")

    def modules(self) -> dict[str, Any]:
        transformer = LatteTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=parts.CHANNELS,
            out_channels=2 * parts.CHANNELS,  # the pipeline drops the second half, the learnt variance
            num_layers=4,
            cross_attention_dim=192,
            attention_bias=True,
            sample_size=parts.HEIGHT // parts.SPATIAL,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=parts.TEXT_DIM,
            video_length=parts.LATENT_FRAMES,
        )
        return {"transformer": transformer}

    @cached_property
    def scheduler(self) -> Any:
        return DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noise = batch.noise()
        size, _, frames = noise.shape[:3]
        timestep = torch.randint(1000, (size,), generator=batch.generator)
        noisy = self.scheduler.add_noise(batch.latents, noise, timestep)
        # All tokens of padding have the same key and value: one stands for those that were not made.
        bias = torch.zeros(size * frames, 1, parts.TEXT_LENGTH)
        bias[..., -1] = math.log(1 + PADDED - parts.TEXT_LENGTH)
        output = modules["transformer"](
            noisy, timestep, batch.text, encoder_attention_mask=bias, return_dict=False
        )[0]  # fmt: skip
        return (output[:, : parts.CHANNELS].float() - noise).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        pipe = LattePipeline(
            tokenizer=parts.tokenizer(),
            text_encoder=parts.text_encoder(),
            vae=parts.decoder(),
            transformer=modules["transformer"],
            scheduler=self.scheduler,
        )
        # The pipeline's own way is for VAEs of single pictures.
        pipe.decode_latents = lambda latents, *_, **__: pipe.vae.decode(latents).sample
        return parts.without_progress_bar(pipe)

    def call(self) -> dict[str, Any]:
        call = super().call()
        del call["num_frames"], call["max_sequence_length"]
        return {**call, "video_length": parts.LATENT_FRAMES, "clean_caption": False, "mask_feature": False}


MEMBER = Latte()
