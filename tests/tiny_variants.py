"""Tiny pipelines of classes that others in ``FAMILIES`` stand for too: from an image or a video, frame by frame.

What they start from goes through a real VAE that is as small as can be.
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from tests.family import Family, Stub, masks
from tests.tiny_parts import BATCHED, CONTEXTS, HEADS, WAN, family, model, pipeline


def picture(number: int = 0) -> Image.Image:
    """A picture with a gradient, another one for each number."""
    return Image.linear_gradient("L").rotate(30 * number).resize((32, 32)).convert("RGB")


def film(frames: int) -> list[Image.Image]:
    return [picture(number) for number in range(frames)]


def _flow() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _wan_vae() -> Any:
    return model(
        "AutoencoderKLWan",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _wan_image(second: bool = False, **more: Any) -> Any:
    # Latents, a mask (4 channels), the picture's latents; a picture that is a frame of its own needs no channels.
    config = {**WAN, "in_channels": 4 if more.get("expand_timesteps") else 12}
    transformer = model("WanTransformer3DModel", **config)
    parts = {**more, "vae": _wan_vae(), "image_encoder": None, "image_processor": None}
    if second:
        parts |= {"transformer_2": model("WanTransformer3DModel", **config), "boundary_ratio": 0.78}
    return pipeline("WanImageToVideoPipeline", transformer, _flow(), **parts)


def _wan_video() -> Any:
    return pipeline("WanVideoToVideoPipeline", model("WanTransformer3DModel", **WAN), _flow(), vae=_wan_vae())


def _skyreels(name: str) -> Any:
    transformer = model("SkyReelsV2Transformer3DModel", **WAN)
    vae = {} if name == "SkyReelsV2DiffusionForcingPipeline" else {"vae": _wan_vae()}
    return pipeline(name, transformer, _flow(), **vae)


def _cosmos(name: str, scheduler: Any, vae: Any) -> Any:
    transformer = model(
        "CosmosTransformer3DModel",
        **HEADS,
        in_channels=5,  # latents and the mask of what is given
        out_channels=4,
        num_layers=3,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,  # it would want torchvision
    )
    return pipeline(name, transformer, scheduler, vae=vae, safety_checker=Stub(to=lambda device: None))


def _cosmos1() -> Any:
    vae = model(
        "AutoencoderKLCosmos",
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(),
        resolution=32,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    )
    return _cosmos("CosmosVideoToWorldPipeline", diffusers.EDMEulerScheduler(sigma_data=0.5), vae)


def _cosmos2() -> Any:
    return _cosmos("Cosmos2VideoToWorldPipeline", FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), _wan_vae())


def _cosmos25() -> Any:
    return _cosmos("Cosmos2_5_PredictBasePipeline", _flow(), _wan_vae())


def _ltx(name: str) -> Any:
    transformer = model(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        **HEADS,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=16,
    )
    vae = model(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return pipeline(name, transformer, vae=vae)


def _cogvideox() -> Any:
    transformer = model(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=3,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    )
    vae = model(
        "AutoencoderKLCogVideoX",
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return pipeline("CogVideoXImageToVideoPipeline", transformer, diffusers.CogVideoXDDIMScheduler(), vae=vae)


_BLOCKS = {"blocks": lambda denoiser: list(denoiser.blocks), "entrance": "patch_embedding"}
_LTX: dict[str, Any] = {
    "branches": ("cond_uncond",),
    "rows": 2,
    "size": 64,
    "frames": 17,
    "other": {"size": {"size": 96}, "frames": {"frames": 9}},
    "entrance": "proj_in",
}

VARIANTS: tuple[Family, ...] = (
    family(
        "wan-image",
        _wan_image,
        call=lambda frames, prompts: {"num_frames": frames, "image": picture()},
        **_BLOCKS,
        **CONTEXTS,
    ),
    # One timestep a token: those of the picture have 0.
    family(
        "wan2.2-ti2v-image",
        lambda: _wan_image(expand_timesteps=True),
        call=lambda frames, prompts: {"num_frames": frames, "image": picture()},
        **_BLOCKS,
        **CONTEXTS,
    ),
    family(
        "wan-video",
        _wan_video,
        call=lambda frames, prompts: {"video": [film(frames)] * prompts, "strength": 1.0},
        **_BLOCKS,
    ),
    family(
        "skyreels-forcing",
        lambda: _skyreels("SkyReelsV2DiffusionForcingPipeline"),
        call=lambda frames, prompts: {"num_frames": frames, "prompt": None},
        **_BLOCKS,
        **CONTEXTS,
    ),
    family(
        "skyreels-forcing-image",
        lambda: _skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline"),
        call=lambda frames, prompts: {"num_frames": frames, "image": picture()},
        **_BLOCKS,
        **CONTEXTS,
    ),
    family(
        "skyreels-forcing-video",
        lambda: _skyreels("SkyReelsV2DiffusionForcingVideoToVideoPipeline"),
        call=lambda frames, prompts: {
            "num_frames": frames,
            "video": film(5),
            "overlap_history": 5,
            "base_num_frames": frames,
        },
        frames=17,
        other={"size": {"size": 64}, "frames": {"frames": 13}},
        **_BLOCKS,
        **CONTEXTS,
    ),
    family(
        "cosmos-video",
        _cosmos1,
        call=lambda frames, prompts: {"num_frames": frames, "image": picture()},
        frames=17,
        other={"size": {"size": 64}, "frames": {"frames": 9}},
    ),
    family("cosmos2", _cosmos2, call=lambda frames, prompts: {"num_frames": frames, "image": picture()}),
    family(
        "cosmos2.5",
        _cosmos25,
        # It takes no video for two prompts.
        call=lambda frames, prompts: {
            "num_frames": frames,
            **({"video": film(5), "num_latent_conditional_frames": 1} if prompts == 1 else {}),
        },
    ),
    family(
        "ltx-image",
        lambda: _ltx("LTXImageToVideoPipeline"),
        call=lambda frames, prompts: {"num_frames": frames, "image": picture(), **masks(prompts)},
        **_LTX,
    ),
    family(
        "ltx-condition",
        lambda: _ltx("LTXConditionPipeline"),
        call=lambda frames, prompts: {"num_frames": frames, "image": picture(), **masks(prompts)},
        **_LTX,
    ),
    family(
        "cogvideox-image",
        _cogvideox,
        call=lambda frames, prompts: {"num_frames": frames, "image": film(prompts)},
        **{**BATCHED, "branches": ("cond_uncond",)},
        streams=2,
        kinds=("self_attention", "mlp", "block"),
        width=32,
    ),
)
