"""Wan 2.2 A14B's arrangement: one denoiser for much noise, another one for little, at a boundary of 0.875."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline

from training import models
from training.zoo import wan
from training.zoo.data import Batch
from training.zoo.flow import noised
from training.zoo.member import Member, Modules
from zoo import parts

BOUNDARY = 0.875
BLOCKS = (0, 1, 2, 4, 6, 7)
"""Those of the demo's blocks that both denoisers begin with."""


class WanTwo(Member):
    name = "wan-two"
    about = "Wan 2.2: two denoisers, for high and for low noise, flow matching, UniPC, two calls for guidance"
    blocks = ("blocks",)
    steps = 1200
    lr = 6e-4

    def modules(self) -> dict[str, Any]:
        return {name: wan.transformer(blocks=BLOCKS) for name in ("transformer", "transformer_2")}

    def shortened(self, modules: Modules) -> Modules:
        return wan.shortened(modules)

    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        noisy, timestep, target = noised(batch, models.FLOW_SHIFT)
        high = timestep >= 1000 * BOUNDARY
        error = noisy.new_zeros(())
        for name, rows in (("transformer", high), ("transformer_2", ~high)):
            if rows.any():
                velocity = modules[name](noisy[rows], timestep[rows], batch.text[rows], return_dict=False)[0]
                error = error + (velocity.float() - target[rows]).pow(2).sum()
        return error / target.numel()

    def pipeline(self, modules: Modules) -> Any:
        return parts.without_progress_bar(WanPipeline(**modules, boundary_ratio=BOUNDARY, **wan.components()))

    def call(self) -> dict[str, Any]:
        return wan.call(super().call())


MEMBER = WanTwo()
