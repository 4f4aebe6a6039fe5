"""Tiny pipelines of the families that a few cases of the contract are run for: see ``FAMILIES`` in ``tests.tiny``.

Where a pipeline asks its VAE for numbers only, a stub gives them. Where it cannot do without text encoder or VAE (an
image or a video to start from, decoding inside of its loop), ``Loop`` calls the transformer instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.guiders import ClassifierFreeGuidance

from tests.family import Family, Loop, Stub, lively, loop, masks, quiet
from tests.stand_ins import STDiT3

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
CHANNELS = {"in_channels": 4, "out_channels": 4}
WAN = {**HEADS, **CHANNELS, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
HUNYUAN = {**HEADS, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4, 4)}
WITHOUT = dict.fromkeys(("tokenizer", "text_encoder", "vae"))


def _model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return lively(getattr(diffusers, name)(**config).eval())


def _pipe(name: str, transformer: Any, scheduler: Any = None, **parts: Any) -> Any:
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    return quiet(getattr(diffusers, name)(transformer=transformer, scheduler=scheduler, **{**WITHOUT, **parts}))


def _like(latents: torch.Tensor, *shape: int) -> torch.Tensor:
    """The same noise at every call, for each sample."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(5)).expand(len(latents), *shape)


def _text(latents: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": latents,
        "timestep": timestep,
        "encoder_hidden_states": embeds,
        "return_dict": False,
    }


def _family(name: str, build: Callable[[], Any], **fields: Any) -> Family:
    defaults: dict[str, Any] = {
        "call": lambda frames, prompts: {"num_frames": frames},
        "size": 32,
        "frames": 9,
        "other": {"size": {"size": 64}, "frames": {"frames": 5}},
        "width": 24,
        "branches": ("call 1", "call 2"),
        "rows": 1,
        "blocks": lambda denoiser: list(denoiser.transformer_blocks),
        "entrance": "patch_embed",
        "kinds": ("self_attention", "cross_attention", "mlp", "block"),
    }
    return Family(name=name, build=build, **{**defaults, **fields})


def _wan_like(name: str, build: Callable[[], Any], **fields: Any) -> Family:
    return _family(
        name,
        build,
        **{"blocks": lambda denoiser: list(denoiser.blocks), "entrance": "patch_embedding", **fields},
    )


# --- blocks as Wan --------------------------------------------------------------------------------------------------


def _vace() -> Loop:
    transformer = _model("WanVACETransformer3DModel", **WAN, vace_layers=[0, 2], vace_in_channels=8)
    return loop(
        transformer,
        lambda x, t, e: {**_text(x, t, e), "control_hidden_states": _like(x, 8, *x.shape[2:])},
    )


def _animate() -> Loop:
    config = {**WAN, "in_channels": 12, "latent_channels": 4, "num_layers": 4, "image_dim": None}
    transformer = _model(
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
            **_text(torch.cat([x, _like(x, 8, frames, *size)], dim=1), t, e),
            "pose_hidden_states": _like(x, channels, frames - 1, *size),
            "face_pixel_values": _like(x, 3, 4 * (frames - 1), 16, 16),
        }

    return loop(transformer, inputs)


def _helios() -> Loop:
    config = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    transformer = _model("HeliosTransformer3DModel", **config, rope_dim=(4, 4, 4))

    def inputs(x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> dict[str, Any]:
        call, first = _text(x, t, e), 0
        for name, frames in (("long", 4), ("mid", 2), ("short", 1)):
            call[f"latents_history_{name}"] = _like(x, 4, frames, *x.shape[3:])
            call[f"indices_latents_history_{name}"] = torch.arange(first, first + frames)[None]
            first += frames
        call["indices_hidden_states"] = torch.arange(first, first + x.shape[2])[None]
        return call

    return loop(transformer, inputs)


def _skyreels() -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return _pipe("SkyReelsV2Pipeline", _model("SkyReelsV2Transformer3DModel", **WAN), scheduler)


def _anyflow() -> Any:
    transformer = _model("AnyFlowTransformer3DModel", **WAN)
    return _pipe("AnyFlowPipeline", transformer, diffusers.FlowMapEulerDiscreteScheduler())


# --- joint attention ------------------------------------------------------------------------------------------------


def _hunyuan15() -> Any:
    config = {**HUNYUAN, "num_layers": 3, "in_channels": 9, "out_channels": 4}
    transformer = _model("HunyuanVideo15Transformer3DModel", **config, text_embed_2_dim=16, image_embed_dim=8)
    vae = Stub(temporal_compression_ratio=4, spatial_compression_ratio=16, config=Stub(latent_channels=4))
    pipe = _pipe(
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
    transformer = _model(
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
            **_text(x, t, e),
            "encoder_attention_mask": torch.ones(len(x), 8),
            "pooled_projections": _like(x, 8),
            "image_embeds": _like(x, 2, 8),
            "guidance": torch.full((len(x),), 4.0),
        }
        first = 0
        for name, frames in (("history_4x", 4), ("history_2x", 2), ("clean", 1)):
            call[f"latents_{name}"] = _like(x, 4, frames, *x.shape[3:])
            call[f"indices_latents_{name}"] = torch.arange(first, first + frames)
            first += frames
        return {**call, "indices_latents": torch.arange(first, first + x.shape[2])}

    return loop(transformer, inputs)


def _motif() -> Any:
    config = {key: value for key, value in HUNYUAN.items() if key != "num_refiner_layers"}
    transformer = _model(
        "MotifVideoTransformer3DModel",
        **config,
        in_channels=9,
        out_channels=4,
        num_single_layers=3,
        num_decoder_layers=1,
        enable_text_cross_attention_dual=True,
    )
    vae = Stub(config=Stub(z_dim=4, scale_factor_temporal=4, scale_factor_spatial=8))
    return _pipe("MotifVideoPipeline", transformer, vae=vae, guider=ClassifierFreeGuidance(guidance_scale=4.0))


def _easyanimate() -> Any:
    transformer = _model(
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
    return _pipe("EasyAnimatePipeline", transformer, vae=vae)


def _consisid() -> Loop:
    transformer = _model(
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
        lambda x, t, e: {**_text(x, t, e), "id_cond": _like(x, 8), "id_vit_hidden": [_like(x, 3, 8)] * 5},
        frames_first=True,
    )


# --- the rest -------------------------------------------------------------------------------------------------------


def _allegro() -> Any:
    transformer = _model(
        "AllegroTransformer3DModel", **HEADS, **CHANNELS, num_layers=3, cross_attention_dim=24, caption_channels=16
    )
    # It draws noise at every step.
    return _pipe("AllegroPipeline", transformer, diffusers.EulerAncestralDiscreteScheduler())


def _cosmos() -> Any:
    transformer = _model(
        "CosmosTransformer3DModel",
        **HEADS,
        **CHANNELS,
        num_layers=3,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # it would want torchvision
    )
    checker = Stub(to=lambda device: None)
    return _pipe("CosmosTextToWorldPipeline", transformer, diffusers.EDMEulerScheduler(), safety_checker=checker)


def _kandinsky5() -> Any:
    transformer = _model(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 4, 4),
    )
    return _pipe("Kandinsky5T2VPipeline", transformer, text_encoder_2=None, tokenizer_2=None)


def _kandinsky5_call(frames: int, prompts: int) -> dict[str, Any]:
    call: dict[str, Any] = {"num_frames": frames}
    for sign, prefix in ((1.0, ""), (-1.0, "negative_")):
        call[f"{prefix}prompt_embeds_clip"] = sign * torch.ones(prompts, 8)
        call[f"{prefix}prompt_cu_seqlens"] = torch.arange(prompts + 1) * 8
    return call


def _kandinsky6() -> Any:
    transformer = _model(
        "Kandinsky6Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 4, 4),
        in_audio_dim=4,
        out_audio_dim=4,
    )
    audio = Stub(latent_hop_length=1000, config=Stub(sample_rate=16000))
    return _pipe(
        "Kandinsky6TI2VAPipeline",
        transformer,
        text_encoder_2=None,
        tokenizer_2=None,
        audio_vae=audio,
        vocoder=Stub(),
    )


def _sana_video() -> Any:
    transformer = _model(
        "SanaVideoTransformer3DModel",
        **HEADS,
        **CHANNELS,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    return _pipe("SanaVideoPipeline", transformer)


def _ltx2() -> Any:
    transformer = _model(
        "LTX2VideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        **HEADS,
        cross_attention_dim=24,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=3,
        caption_channels=16,
        perturbed_attn=True,
    )
    one, none = torch.ones(1), torch.zeros(1)
    vae = Stub(
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        latents_mean=none,
        latents_std=one,
        config=Stub(scaling_factor=1.0),
    )
    audio = Stub(mel_bins=8, latent_channels=4, sample_rate=16000, mel_hop_length=160)
    return _pipe(
        "LTX2Pipeline",
        transformer,
        vae=vae,
        audio_vae=Stub(
            mel_compression_ratio=4, temporal_compression_ratio=4, latents_mean=none, latents_std=one, config=audio
        ),
        connectors=lambda embeds, mask, padding_side: (embeds, embeds, mask),
        vocoder=None,
    )


def _open_sora() -> Loop:
    torch.manual_seed(0)
    return loop(STDiT3().eval(), lambda x, t, e: {"x": x, "timestep": t, "y": e[:, None]})


def _alternating(denoiser: Any) -> list[Any]:
    pairs = zip(denoiser.spatial_blocks, denoiser.temporal_blocks, strict=True)
    return [block for pair in pairs for block in pair]


CONTEXTS = {"branches": ("cond", "uncond")}
GUIDER = {"branches": ("pred_cond", "pred_uncond"), "guide": None}
BATCHED = {"branches": ("call 1",), "rows": 2}
JOINT = {"streams": 2, "kinds": ("self_attention", "mlp", "block")}
NO_TEXT = {"negative_prompt": None}

MORE = (
    _wan_like("skyreels", _skyreels, **CONTEXTS),
    _wan_like("chronoedit", lambda: loop(_model("ChronoEditTransformer3DModel", **WAN), _text)),
    _wan_like("wan-vace", _vace),
    _wan_like("wan-animate", _animate),
    _wan_like("helios", _helios, kinds=("self_attention", "mlp", "block")),
    _wan_like("anyflow", _anyflow, **BATCHED),
    _family(
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
    _family(
        "framepack",
        _framepack,
        **JOINT,
        kept=1,
        blocks=lambda denoiser: [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks],
        entrance="x_embedder",
        attention="attn",
    ),
    _family(
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
    _family(
        "easyanimate",
        _easyanimate,
        call=lambda frames, prompts: {"num_frames": frames, **masks(prompts)},
        **BATCHED,
        **JOINT,
        entrance="proj",
        width=32,
    ),
    _family("consisid", _consisid, **JOINT, width=48),
    _family(
        "allegro",
        _allegro,
        call=lambda frames, prompts: {"num_frames": frames, **masks(prompts), **NO_TEXT},
        **BATCHED,
        entrance="pos_embed",
    ),
    _family("cosmos", _cosmos, frames=17, other={"size": {"size": 64}, "frames": {"frames": 9}}),
    _family(
        "kandinsky5",
        _kandinsky5,
        call=_kandinsky5_call,
        embeds=("prompt_embeds_qwen", "negative_prompt_embeds_qwen"),
        blocks=lambda denoiser: list(denoiser.visual_transformer_blocks),
        entrance="visual_embeddings",
        attention="self_attention",
        query="to_query",
    ),
    _family(
        "kandinsky6",
        _kandinsky6,
        call=lambda frames, prompts: {
            "num_frames": frames,
            "pooled_prompt_embeds": torch.ones(prompts, 8),
            "negative_pooled_prompt_embeds": -torch.ones(prompts, 8),
        },
        **CONTEXTS,
        streams=2,
        blocks=lambda denoiser: list(denoiser.visual_transformer_blocks),
        entrance="visual_embeddings",
        attention="video_dec_block.self_attention",
        query="to_query",
    ),
    _family(
        "sana-video",
        _sana_video,
        call=lambda frames, prompts: {
            "frames": frames,
            **masks(prompts),
            **NO_TEXT,
            "use_resolution_binning": False,
        },
        **BATCHED,
        entrance="patch_embedding",
        slices=False,
    ),
    _family(
        "ltx2",
        _ltx2,
        call=lambda frames, prompts: {
            "num_frames": frames,
            **masks(prompts),
            "spatio_temporal_guidance_blocks": [1],
        },
        branches=("cond_uncond", "uncond_stg", "uncond_modality"),
        size=64,
        frames=17,
        other={"size": {"size": 96}, "frames": {"frames": 9}},
        streams=2,
        entrance="proj_in",
        query="to_v",  # guidance by perturbation leaves out queries and keys
        kinds=("self_attention", "cross_attention", "audio", "mlp", "block"),
    ),
    _family(
        "open-sora",
        _open_sora,
        blocks=_alternating,
        entrance="x_embedder",
        attention="attn",
        query="qkv",
        slices=False,
    ),
)
"""Secondary families. The last one is no model of diffusers, but a stand-in with the structure of one."""
