"""Tiny pipelines with joint attention of video and text: see ``FAMILIES`` in ``tests.tiny``."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

from tests.family import Loop, Stub, loop, masks
from tests.tiny_parts import BATCHED, CHANNELS, GUIDER, HUNYUAN, JOINT, family, like, model, pipeline, text_inputs


def _hunyuan15() -> Any:
    config = {**HUNYUAN, "num_layers": 3, "in_channels": 9, "out_channels": 4}
    transformer = model("HunyuanVideo15Transformer3DModel", **config, text_embed_2_dim=16, image_embed_dim=8)
    vae = Stub(temporal_compression_ratio=4, spatial_compression_ratio=16, config=Stub(latent_channels=4))
    pipe = pipeline(
        "HunyuanVideo15Pipeline",
        transformer,
        vae=vae,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.vision_num_semantic_tokens = 4
    return pipe


def _hunyuan15_call(frames: int, prompts: int) -> dict[str, Any]:
    call: dict[str, Any] = {"num_frames": frames}
    for sign, prefix in ((1.0, ""), (-1.0, "negative_")):
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(prompts, 8)
        call[f"{prefix}prompt_embeds_2"] = sign * torch.ones(prompts, 3, 16)
        call[f"{prefix}prompt_embeds_mask_2"] = torch.ones(prompts, 3)
    return call


def _framepack() -> Loop:
    transformer = model(
        "HunyuanVideoFramepackTransformer3DModel",
        **HUNYUAN,
        **CHANNELS,
        num_single_layers=2,
        pooled_projection_dim=8,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )

    def inputs(x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> dict[str, Any]:
        call = {
            **text_inputs(x, t, e),
            "encoder_attention_mask": torch.ones(len(x), 8),
            "pooled_projections": like(x, 8),
            "image_embeds": like(x, 2, 8),
            "guidance": torch.full((len(x),), 4.0),
        }
        first = 0
        for name, frames in (("history_4x", 4), ("history_2x", 2), ("clean", 1)):
            call[f"latents_{name}"] = like(x, 4, frames, *x.shape[3:])
            call[f"indices_latents_{name}"] = torch.arange(first, first + frames)
            first += frames
        return {**call, "indices_latents": torch.arange(first, first + x.shape[2])}

    return loop(transformer, inputs)


def _motif() -> Any:
    config = {key: value for key, value in HUNYUAN.items() if key != "num_refiner_layers"}
    transformer = model(
        "MotifVideoTransformer3DModel",
        **config,
        in_channels=9,
        out_channels=4,
        num_single_layers=3,
        num_decoder_layers=1,
        enable_text_cross_attention_dual=True,
    )
    vae = Stub(config=Stub(z_dim=4, scale_factor_temporal=4, scale_factor_spatial=8))
    return pipeline("MotifVideoPipeline", transformer, vae=vae, guider=ClassifierFreeGuidance(guidance_scale=4.0))


def _easyanimate() -> Any:
    transformer = model(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        **CHANNELS,
        patch_size=2,
        num_layers=3,
        mmdit_layers=3,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    vae = Stub(spatial_compression_ratio=8, temporal_compression_ratio=4, config=Stub(latent_channels=4))
    return pipeline("EasyAnimatePipeline", transformer, vae=vae)


def _consisid() -> Loop:
    transformer = model(
        "ConsisIDTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        **CHANNELS,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=4,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=8,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=5,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
        LFE_ff_mult=1,
    )
    return loop(
        transformer,
        lambda x, t, e: {**text_inputs(x, t, e), "id_cond": like(x, 8), "id_vit_hidden": [like(x, 3, 8)] * 5},
        frames_first=True,
    )


JOINT_LIKE = (
    family(
        "hunyuan-video-1.5",
        _hunyuan15,
        call=_hunyuan15_call,
        **GUIDER,
        **JOINT,
        kept=1,
        entrance="x_embedder",
        attention="attn",
        callbacks=False,
    ),
    family(
        "framepack",
        _framepack,
        **JOINT,
        kept=1,
        blocks=lambda denoiser: [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks],
        entrance="x_embedder",
        attention="attn",
    ),
    family(
        "motif",
        _motif,
        call=lambda frames, prompts: {"num_frames": frames, **masks(prompts)},
        **GUIDER,
        **JOINT,
        kept=1,
        blocks=lambda denoiser: [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks],
        entrance="x_embedder",
        attention="attn",
    ),
    family(
        "easyanimate",
        _easyanimate,
        call=lambda frames, prompts: {"num_frames": frames, **masks(prompts)},
        **BATCHED,
        **JOINT,
        entrance="proj",
        width=32,
    ),
    family("consisid", _consisid, **JOINT, width=48),
)
