"""Open-Sora 1.2: spatial and temporal blocks alternate, rectified flow, Euler, 30 steps as its codebooks want."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from training.zoo.data import Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from zoo import parts
from zoo.open_sora import OpenSoraPipeline, STDiT3

SHIFT = 3.0


class OpenSora(Member):
    name = "open-sora"
    about = "Open-Sora 1.2 (STDiT3): alternating spatial and temporal blocks, rectified flow, Euler, batched guidance"
    blocks = ("spatial_blocks", "temporal_blocks")

    def modules(self) -> dict[str, Any]:
        return {"transformer": STDiT3(in_channels=parts.CHANNELS, caption_channels=parts.TEXT_DIM)}

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noisy, timestep, target = noised(batch, SHIFT)
        velocity = modules["transformer"](noisy, timestep, batch.text[:, None], mask=batch.mask)
        return (velocity.float() - target).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        pipe = OpenSoraPipeline(
            tokenizer=parts.tokenizer(),
            text_encoder=parts.text_encoder(),
            vae=parts.decoder(),
            transformer=modules["transformer"],
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )
        return parts.without_progress_bar(pipe)

    def call(self) -> dict[str, Any]:
        return {**super().call(), "num_inference_steps": 30}


MEMBER = OpenSora()
