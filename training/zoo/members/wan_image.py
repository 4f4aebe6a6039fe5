"""Wan's image to video: the first frame is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from training import models
from training.zoo import wan
from training.zoo.data import Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from unicp.demo import scenes
from unicp.demo.scenes import Scene
from zoo import parts


class WanImage(Member):
    name = "wan-image"
    about = "Wan image to video: the first frame is given, flow matching, UniPC, two calls for guidance"
    blocks = ("blocks",)
    data = ("image",)
    steps = 1000
    lr = 6e-4

    def modules(self) -> dict[str, Any]:
        return {"transformer": wan.transformer(more_channels=parts.TEMPORAL + parts.CHANNELS)}

    def shortened(self, modules: Modules) -> Modules:
        return wan.shortened(modules)

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noisy, timestep, target = noised(batch, models.FLOW_SHIFT)
        size, _, *shape = noisy.shape
        given = torch.zeros(size, parts.TEMPORAL, *shape)
        given[:, :, 0] = 1
        velocity = modules["transformer"](
            torch.cat([noisy, given, batch.first_frame], 1), timestep, batch.text, return_dict=False
        )[0]  # fmt: skip
        return (velocity.float() - target).pow(2).mean()

    def pipeline(self, modules: Modules) -> Any:
        return parts.without_progress_bar(WanImageToVideoPipeline(**modules, **wan.components()))

    def inputs(self, scene: Scene) -> dict[str, Any]:
        frame = scenes.render(scene, frames=parts.FRAMES, height=parts.HEIGHT, width=parts.WIDTH)[0]
        return {"image": Image.fromarray((frame * 255).round().astype(np.uint8))}

    def call(self) -> dict[str, Any]:
        return wan.call(super().call())


MEMBER = WanImage()
