"""What a member of the proving ground is: its architecture, its loss, and its pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.zoo.data import Batch
from unicp.demo.scenes import Scene
from zoo import parts

Modules = Mapping[str, Any]
"""Trained components of a pipeline, by the pipeline's name for them."""


class Member(ABC):
    """One architecture. A file in ``training/zoo/members`` holds one.

    Attributes:
        name: what users call it; a folder of that name in ``zoo`` has its weights.
        about: one sentence for its card.
        blocks: attributes of its denoisers whose matrices are trained with Muon.
        data: the kinds of videos it is trained on, in turn.
        steps, lr: how long and at which learning rate it is trained by default.
    """

    name: str
    about: str
    blocks: tuple[str, ...] = ("transformer_blocks",)
    data: tuple[str, ...] = ("video",)
    steps: int = 2000
    lr: float = 1.2e-3

    @abstractmethod
    def modules(self) -> dict[str, Any]:
        """The components to be trained, with new weights."""

    def load(self, folder: Path) -> dict[str, Any]:
        """The components as ``training.zoo.export`` has written them, in float32."""
        return {
            name: type(module).from_pretrained(folder / name, dtype=torch.float32).eval()
            for name, module in self.modules().items()
        }

    def shortened(self, modules: Modules) -> Modules:
        """The same components; for training, what can be computed with less arithmetic may be replaced in them."""
        return modules

    @abstractmethod
    def loss(self, modules: Modules, batch: Batch) -> torch.Tensor:
        """The mean error of one batch."""

    @abstractmethod
    def pipeline(self, modules: Modules) -> Any:
        """The pipeline that runs these components."""

    def inputs(self, scene: Scene) -> dict[str, Any]:
        """What the pipeline's call takes for one scene besides its caption: nothing, for most members."""
        return {}

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, besides the prompt: those that the member was trained for."""
        return {
            "height": parts.HEIGHT,
            "width": parts.WIDTH,
            "num_frames": parts.FRAMES,
            "num_inference_steps": 50,
            "guidance_scale": 4.0,
            "max_sequence_length": parts.TEXT_LENGTH,
        }
