"""The demo model, fine-tuned on 192 x 192 pixels too: 1,008 tokens, most of the arithmetic in attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline

from training import models
from training.zoo import wan
from training.zoo.data import KINDS, Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from zoo import parts


class WanLargeFrame(Member):
    name = "wan-large-frame"
    about = "Wan at 192 x 192 (1,008 tokens) as well as 96 x 96, flow matching, UniPC, two calls for guidance"
    blocks = ("blocks",)
    data = ("large", "video")
    steps = 1200
    lr = 6e-4

    def modules(self) -> dict[str, Any]:
        return {"transformer": wan.transformer()}

    def shortened(self, modules: Modules) -> Modules:
        return wan.shortened(modules)

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noisy, timestep, target = noised(batch, models.FLOW_SHIFT)
        velocity = modules["transformer"](noisy, timestep, batch.text, return_dict=False)[0]
        return (velocity.float() - target).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        return parts.without_progress_bar(WanPipeline(**modules, **wan.components()))

    def call(self) -> dict[str, Any]:
        height, width = KINDS["large"].size
        return {**wan.call(super().call()), "height": height, "width": width}


MEMBER = WanLargeFrame()
