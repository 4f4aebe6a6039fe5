"""Tiny modular pipelines of diffusers: blocks instead of a ``__call__``, and a guider that names the branches."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.ltx.modular_pipeline import LTXVideoPachifier
from diffusers.modular_pipelines.qwenimage.modular_pipeline import QwenImagePachifier

from tests.family import part
from tests.tiny import FAMILIES
from tests.tiny_parts import HUNYUAN, WAN, model


def assembled(module: str, core: str, **components: Any) -> Any:
    """The pipeline of a model's denoising blocks, without those for text and VAE."""
    blocks = getattr(__import__(f"diffusers.modular_pipelines.{module}", fromlist=[core]), core)
    pipe = blocks().init_pipeline()
    pipe.update_components(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(seed))


class Wan:
    branches = ("call 1", "call 2")  # its blocks set no cache context

    def build(self, guider: Any = None) -> Any:
        part("WanModularPipeline")
        return assembled(
            "wan.modular_blocks_wan",
            "WanCoreDenoiseStep",
            transformer=model("WanTransformer3DModel", **{**WAN, "in_channels": 16, "out_channels": 16}),
            scheduler=FAMILIES["wan"].build().scheduler,
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
        )

    def call(self) -> dict[str, Any]:
        return {"prompt_embeds": _embeds(1), "negative_prompt_embeds": _embeds(101)}


class Hunyuan15:
    branches = ("pred_cond", "pred_uncond")

    def build(self, guider: Any = None) -> Any:
        part("HunyuanVideo15ModularPipeline")
        config = {**HUNYUAN, "num_layers": 3, "in_channels": 65, "out_channels": 32}
        return assembled(
            "hunyuan_video1_5.modular_blocks_hunyuan_video1_5",
            "HunyuanVideo15CoreDenoiseStep",
            transformer=model("HunyuanVideo15Transformer3DModel", **config, text_embed_2_dim=16, image_embed_dim=8),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
        )

    def call(self) -> dict[str, Any]:
        call: dict[str, Any] = {}
        for seed, sign, prefix in ((1, 1.0, ""), (101, -1.0, "negative_")):
            call[f"{prefix}prompt_embeds"] = _embeds(seed)
            call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 8)
            call[f"{prefix}prompt_embeds_2"] = sign * torch.ones(1, 3, 16)
            call[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 3)
        return call


MODULAR = {"wan": Wan(), "hunyuan-video-1.5": Hunyuan15()}
"""By name: how to build it, the inputs of a call, and its branches as records name them."""


class Wan22(Wan):
    """Two denoisers, each with a guider of its own."""

    denoisers = ("transformer", "transformer_2")

    def build(self, guider: Any = None) -> Any:
        part("Wan22ModularPipeline")
        config = {**WAN, "in_channels": 16, "out_channels": 16}
        second = model("WanTransformer3DModel", **config)
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.mul_(0.9)
        pipe = assembled(
            "wan.modular_blocks_wan22",
            "Wan22CoreDenoiseStep",
            transformer=model("WanTransformer3DModel", **config),
            transformer_2=second,
            scheduler=FAMILIES["wan"].build().scheduler,
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
            guider_2=ClassifierFreeGuidance(guidance_scale=3.0),
        )
        pipe.update_components(boundary_ratio=0.78)  # between steps 4 and 5 of 10
        return pipe


class LTX:
    branches = ("pred_cond", "pred_uncond")

    def build(self, guider: Any = None) -> Any:
        part("LTXModularPipeline")
        ordinary = FAMILIES["ltx"].build()
        return assembled(
            "ltx.modular_blocks_ltx",
            "LTXCoreDenoiseStep",
            transformer=ordinary.transformer,
            scheduler=ordinary.scheduler,
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
            pachifier=LTXVideoPachifier(),
        )

    def call(self) -> dict[str, Any]:
        masks = {f"{sign}prompt_attention_mask": torch.ones(1, 8) for sign in ("", "negative_")}
        return {"prompt_embeds": _embeds(1), "negative_prompt_embeds": _embeds(101), "frame_rate": 25, **masks}


class Qwen:
    """An image model: its latents are of one frame."""

    branches = ("call 1", "call 2")

    def build(self, guider: Any = None) -> Any:
        part("QwenImageModularPipeline")
        transformer = model(
            "QwenImageTransformer2DModel",
            in_channels=64,
            out_channels=16,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
        )
        return assembled(
            "qwenimage.modular_blocks_qwenimage",
            "QwenImageCoreDenoiseStep",
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            guider=guider or ClassifierFreeGuidance(guidance_scale=4.0),
            pachifier=QwenImagePachifier(),
        )

    def call(self) -> dict[str, Any]:
        masks = {f"{sign}prompt_embeds_mask": torch.ones(1, 8, dtype=torch.long) for sign in ("", "negative_")}
        return {"prompt_embeds": _embeds(1), "negative_prompt_embeds": _embeds(101), **masks}


class Flux:
    """An image model without a guider: its guidance is an input of the transformer."""

    branches = ("call 1",)

    def build(self, guider: Any = None) -> Any:
        part("FluxModularPipeline")
        transformer = model(
            "FluxTransformer2DModel",
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 4),
            guidance_embeds=True,
        )
        scheduler = FlowMatchEulerDiscreteScheduler()
        return assembled(
            "flux.modular_blocks_flux", "FluxCoreDenoiseStep", transformer=transformer, scheduler=scheduler
        )

    def call(self) -> dict[str, Any]:
        return {"prompt_embeds": _embeds(1), "pooled_prompt_embeds": _embeds(2)[:, 0]}


GUIDED = {**MODULAR, "wan-2.2": Wan22(), "ltx": LTX(), "qwen-image": Qwen()}
"""Those that have guiders."""
