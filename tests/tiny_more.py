"""Tiny pipelines of all other secondary families: see ``FAMILIES`` in ``tests.tiny``.

Where a pipeline asks its VAE for numbers only, a stub gives them. Where it cannot do without text encoder or VAE (an
image or a video to start from, decoding inside of its loop), ``Loop`` calls the transformer instead.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.family import Loop, Stub, loop, masks
from tests.stand_ins import STDiT3
from tests.tiny_joint import JOINT_LIKE
from tests.tiny_parts import BATCHED, CHANNELS, CONTEXTS, HEADS, NO_TEXT, family, like, model, pipeline
from tests.tiny_wan import WAN_LIKE


def _allegro() -> Any:
    transformer = model(
        "AllegroTransformer3DModel", **HEADS, **CHANNELS, num_layers=3, cross_attention_dim=24, caption_channels=16
    )
    # It draws noise at every step.
    return pipeline("AllegroPipeline", transformer, diffusers.EulerAncestralDiscreteScheduler())


def _cosmos() -> Any:
    transformer = model(
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
    return pipeline("CosmosTextToWorldPipeline", transformer, diffusers.EDMEulerScheduler(), safety_checker=checker)


KANDINSKY: dict[str, Any] = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}
SECOND_TEXT: dict[str, Any] = dict.fromkeys(("text_encoder_2", "tokenizer_2"))


def _kandinsky5() -> Any:
    transformer = model("Kandinsky5Transformer3DModel", **KANDINSKY)
    return pipeline("Kandinsky5T2VPipeline", transformer, **SECOND_TEXT)


def _kandinsky5_call(frames: int, prompts: int) -> dict[str, Any]:
    call: dict[str, Any] = {"num_frames": frames}
    for sign, prefix in ((1.0, ""), (-1.0, "negative_")):
        call[f"{prefix}prompt_embeds_clip"] = sign * torch.ones(prompts, 8)
        call[f"{prefix}prompt_cu_seqlens"] = torch.arange(prompts + 1) * 8
    return call


def _kandinsky6() -> Any:
    transformer = model("Kandinsky6Transformer3DModel", **KANDINSKY, in_audio_dim=4, out_audio_dim=4)
    audio = Stub(latent_hop_length=1000, config=Stub(sample_rate=16000))
    return pipeline("Kandinsky6TI2VAPipeline", transformer, **SECOND_TEXT, audio_vae=audio, vocoder=Stub())


def _sana_video() -> Any:
    transformer = model(
        "SanaVideoTransformer3DModel",
        **HEADS,
        **CHANNELS,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    return pipeline("SanaVideoPipeline", transformer)


def _sana_wm() -> Loop:
    transformer = model(
        "SanaWMTransformer3DModel",
        in_channels=4,
        num_layers=4,  # the second and the fourth have softmax attention
        hidden_size=24,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=12,
        chunk_plucker_channels=6,
        caption_channels=16,
    )

    def inputs(x: torch.Tensor, t: torch.Tensor, e: torch.Tensor) -> dict[str, Any]:
        frames = x.shape[2]
        return {
            "hidden_states": x,
            "timestep": t.reshape(-1, 1, 1).expand(-1, 1, frames),
            "encoder_hidden_states": e[:, None],
            "encoder_attention_mask": torch.ones(len(x), 8),
            "chunk_plucker": like(x, 6, *x.shape[2:]),
            "return_dict": False,
        }

    return loop(transformer, inputs)


def _ltx2() -> Any:
    transformer = model(
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
    return pipeline(
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


REST = (
    family(
        "allegro",
        _allegro,
        call=lambda frames, prompts: {"num_frames": frames, **masks(prompts), **NO_TEXT},
        **BATCHED,
        entrance="pos_embed",
    ),
    family("cosmos", _cosmos, frames=17, other={"size": {"size": 64}, "frames": {"frames": 9}}),
    family(
        "kandinsky5",
        _kandinsky5,
        call=_kandinsky5_call,
        embeds=("prompt_embeds_qwen", "negative_prompt_embeds_qwen"),
        blocks=lambda denoiser: list(denoiser.visual_transformer_blocks),
        entrance="visual_embeddings",
        attention="self_attention",
        query="to_query",
    ),
    family(
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
    family(
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
    family(
        "sana-wm",
        _sana_wm,
        blocks=lambda denoiser: list(denoiser.blocks),
        entrance="x_embedder",
        attention="attn",
        query="proj",
        slices=False,
    ),
    family(
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
    family(
        "open-sora",
        _open_sora,
        blocks=_alternating,
        entrance="x_embedder",
        attention="attn",
        query="qkv",
        slices=False,
    ),
)

MORE = (*WAN_LIKE, *JOINT_LIKE, *REST)
"""Open-Sora, among them, is no model of diffusers, but a stand-in with the structure of one."""
