"""Real diffusers pipelines with tiny random weights: one entry a family in ``FAMILIES``, and nothing else to add.

No text encoder and no VAE: prompts are embeddings, and what a run returns are its latents.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.family import Family, denoisers, masks, quiet
from tests.tiny_more import MORE
from tests.tiny_variants import VARIANTS

__all__ = ["FAMILIES", "Family", "denoisers", "wan_transformer"]

LAYERS = 3


def wan_transformer(seed: int = 0, layers: int = LAYERS) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    ).eval()


def _wan(second: bool = False, **more: Any) -> WanPipeline:
    # The boundary lies between steps 4 and 5 of 10.
    more |= {"transformer_2": wan_transformer(seed=1), "boundary_ratio": 0.78} if second else {}
    return quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=None,
            transformer=wan_transformer(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            **more,
        )
    )


def _ltx() -> LTXPipeline:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=LAYERS,
        caption_channels=16,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    return quiet(LTXPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer))


def _cogvideox() -> CogVideoXPipeline:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=LAYERS,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=8,
    ).eval()
    scheduler = CogVideoXDDIMScheduler()
    return quiet(
        CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    )


def _latte() -> LattePipeline:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=4,
        num_layers=LAYERS,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        caption_channels=16,
        cross_attention_dim=24,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    ).eval()
    return quiet(
        LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=DDIMScheduler())
    )


def _hunyuan() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4),
    ).eval()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    return quiet(HunyuanVideoPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def _mochi() -> MochiPipeline:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=LAYERS,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=8,
    ).eval()
    with torch.no_grad():  # zeros in a new model
        transformer.pos_frequencies.normal_()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "vae"))
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(MochiPipeline(transformer=transformer, scheduler=scheduler, **parts))


def _alternating(denoiser: Any) -> list[Any]:
    pairs = zip(denoiser.transformer_blocks, denoiser.temporal_transformer_blocks, strict=True)
    return [block for pair in pairs for block in pair]


_WAN = Family(
    name="wan",
    primary=True,
    build=_wan,
    call=lambda frames, prompts: {"num_frames": frames},
    size=32,
    frames=9,
    other={"size": {"size": 48}, "frames": {"frames": 5}},
    width=24,
    branches=("cond", "uncond"),
    rows=1,
    blocks=lambda denoiser: list(denoiser.blocks),
    entrance="patch_embedding",
    kinds=("self_attention", "cross_attention", "mlp", "block"),
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _WAN,
        Family(
            **{
                **vars(_WAN),
                "name": "wan2.2",
                "build": lambda: _wan(second=True),
                "denoisers": ("transformer", "transformer_2"),
            }
        ),
        # One timestep a token.
        Family(**{**vars(_WAN), "name": "wan2.2-ti2v", "build": lambda: _wan(expand_timesteps=True), "primary": False}),
        Family(
            name="ltx",
            primary=True,
            build=_ltx,
            call=lambda frames, prompts: {
                "num_frames": frames,
                **masks(prompts),
            },
            size=64,
            frames=17,
            other={"size": {"size": 96}, "frames": {"frames": 9}},
            width=24,
            branches=("cond_uncond",),
            rows=2,
            blocks=lambda denoiser: list(denoiser.transformer_blocks),
            entrance="proj_in",
            kinds=("self_attention", "cross_attention", "mlp", "block"),
        ),
        Family(
            name="cogvideox",
            primary=True,
            build=_cogvideox,
            call=lambda frames, prompts: {"num_frames": frames},
            size=32,
            frames=9,
            other={"size": {"size": 48}, "frames": {"frames": 5}},
            width=32,
            branches=("cond_uncond",),
            rows=2,
            blocks=lambda denoiser: list(denoiser.transformer_blocks),
            entrance="patch_embed",
            streams=2,
        ),
        Family(
            name="latte",
            primary=True,
            build=_latte,
            call=lambda frames, prompts: {"video_length": frames, "negative_prompt": None},
            size=32,
            frames=3,
            other={"size": {"size": 48}, "frames": {"frames": 1}},
            width=24,
            branches=("call 1",),
            rows=2,
            blocks=_alternating,
            entrance="pos_embed",
        ),
        Family(
            name="hunyuan-video",
            primary=True,
            build=_hunyuan,
            call=lambda frames, prompts: {
                "num_frames": frames,
                **masks(prompts),
                "pooled_prompt_embeds": torch.ones(prompts, 8),
                "negative_pooled_prompt_embeds": -torch.ones(prompts, 8),
            },
            guide="true_cfg_scale",
            size=32,
            frames=9,
            other={"size": {"size": 48}, "frames": {"frames": 5}},
            width=24,
            branches=("cond", "uncond"),
            rows=1,
            blocks=lambda denoiser: [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks],
            entrance="x_embedder",
            attention="attn",
            streams=2,
            kept=1,
        ),
        Family(
            name="mochi",
            primary=True,
            build=_mochi,
            call=lambda frames, prompts: {"num_frames": frames, **masks(prompts)},
            size=32,
            frames=13,
            other={"size": {"size": 48}, "frames": {"frames": 7}},
            width=24,
            branches=("cond_uncond",),
            rows=2,
            blocks=lambda denoiser: list(denoiser.transformer_blocks),
            entrance="patch_embed",
            streams=2,
            kept=1,
        ),
        *MORE,
        *VARIANTS,
    )
}
"""Every family that the contract is run for, by name."""
