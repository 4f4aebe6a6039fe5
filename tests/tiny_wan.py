"""Tiny pipelines with blocks as Wan: see ``FAMILIES`` in ``tests.tiny``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import UniPCMultistepScheduler

from tests.family import Family, Loop, loop
from tests.tiny_parts import BATCHED, CONTEXTS, WAN, family, like, model, pipeline, text_inputs


def _wan_like(name: str, build: Callable[[], Any], **fields: Any) -> Family:
    return family(
        name,
        build,
        **{"blocks": lambda denoiser: list(denoiser.blocks), "entrance": "patch_embedding", **fields},
    )


def _vace() -> Loop:
    transformer = model("WanVACETransformer3DModel", **WAN, vace_layers=[0, 2], vace_in_channels=8)
    return loop(
        transformer,
        lambda x, t, e: {**text_inputs(x, t, e), "control_hidden_states": like(x, 8, *x.shape[2:])},
    )


def _animate() -> Loop:
    config = {**WAN, "in_channels": 12, "latent_channels": 4, "num_layers": 4, "image_dim": None}
    transformer = model(
        "WanAnimateTransformer3DModel",
        **config,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )

    def inputs(x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> dict[str, Any]:
        _, channels, frames, *size = x.shape
        return {
            **text_inputs(torch.cat([x, like(x, 8, frames, *size)], dim=1), t, e),
            "pose_hidden_states": like(x, channels, frames - 1, *size),
            "face_pixel_values": like(x, 3, 4 * (frames - 1), 16, 16),
        }

    return loop(transformer, inputs)


def _helios() -> Loop:
    config = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    transformer = model("HeliosTransformer3DModel", **config, rope_dim=(4, 4, 4))

    def inputs(x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> dict[str, Any]:
        call, first = text_inputs(x, t, e), 0
        for name, frames in (("long", 4), ("mid", 2), ("short", 1)):
            call[f"latents_history_{name}"] = like(x, 4, frames, *x.shape[3:])
            call[f"indices_latents_history_{name}"] = torch.arange(first, first + frames)[None]
            first += frames
        call["indices_hidden_states"] = torch.arange(first, first + x.shape[2])[None]
        return call

    return loop(transformer, inputs)


def _skyreels() -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipeline("SkyReelsV2Pipeline", model("SkyReelsV2Transformer3DModel", **WAN), scheduler)


def _anyflow() -> Any:
    transformer = model("AnyFlowTransformer3DModel", **WAN)
    return pipeline("AnyFlowPipeline", transformer, diffusers.FlowMapEulerDiscreteScheduler())


WAN_LIKE = (
    _wan_like("skyreels", _skyreels, **CONTEXTS),
    _wan_like("chronoedit", lambda: loop(model("ChronoEditTransformer3DModel", **WAN), text_inputs)),
    _wan_like("wan-vace", _vace),
    _wan_like("wan-animate", _animate),
    _wan_like("helios", _helios, kinds=("self_attention", "mlp", "block")),
    _wan_like("anyflow", _anyflow, **BATCHED),
)
