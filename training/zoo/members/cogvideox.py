"""CogVideoX: joint attention of video and text, v-prediction over 1,000 timesteps, DDIM, batched guidance."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from training.zoo.data import Batch
from training.zoo.member import Member, Modules
from zoo import parts


class CogVideoX(Member):
    name = "cogvideox"
    about = "CogVideoX: joint attention of video and text, v-prediction, DDIM, batched guidance"

    def modules(self) -> dict[str, Any]:
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=parts.CHANNELS,
            out_channels=parts.CHANNELS,
            time_embed_dim=96,
            text_embed_dim=parts.TEXT_DIM,
            num_layers=8,
            sample_width=parts.WIDTH // parts.SPATIAL,
            sample_height=parts.HEIGHT // parts.SPATIAL,
            sample_frames=parts.FRAMES,
            patch_size=2,
            temporal_compression_ratio=parts.TEMPORAL,
            max_text_seq_length=parts.TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        )
        return {"transformer": transformer}

    @cached_property
    def scheduler(self) -> Any:
        """The settings of CogVideoX-2B."""
        return CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            clip_sample=False,
        )

    @cached_property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        pipe = self.pipeline(self.modules())
        return pipe._prepare_rotary_positional_embeddings(parts.HEIGHT, parts.WIDTH, parts.LATENT_FRAMES, pipe.device)

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        clean = batch.latents.transpose(1, 2)  # (B, F, C, H, W)
        noise = batch.noise().transpose(1, 2)
        timestep = torch.randint(1000, (len(clean),), generator=batch.generator)
        signal = self.scheduler.alphas_cumprod[timestep].float().view(-1, 1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        velocity = modules["transformer"](
            noisy, batch.text, timestep, image_rotary_emb=self.rotary, return_dict=False
        )[0]  # fmt: skip
        return (velocity.float() - (signal.sqrt() * noise - (1 - signal).sqrt() * clean)).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        pipe = CogVideoXPipeline(
            tokenizer=parts.tokenizer(),
            text_encoder=parts.text_encoder(),
            vae=parts.decoder(),
            transformer=modules["transformer"],
            scheduler=self.scheduler,
        )
        return parts.without_progress_bar(pipe)


MEMBER = CogVideoX()
