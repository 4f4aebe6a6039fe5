"""Flow matching: what the members with a velocity from data to noise share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from training.zoo.data import Batch


class Noised(NamedTuple):
    """Noisy latents (B, C, F, H, W), their timesteps (B,) in [0, 1000], and the velocity from data to noise."""

    latents: torch.Tensor
    timestep: torch.Tensor
    velocity: torch.Tensor


def noised(batch: Batch, shift: float) -> Noised:
    """A noise level for each video, logit-normal and shifted like the sampler's."""
    level = torch.sigmoid(torch.randn(len(batch.latents), generator=batch.generator))
    level = shift * level / (1 + (shift - 1) * level)
    noise, sigma = batch.noise(), level.view(-1, 1, 1, 1, 1)
    return Noised((1 - sigma) * batch.latents + sigma * noise, level * 1000, noise - batch.latents)
