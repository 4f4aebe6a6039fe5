"""The published video models, as they are configured, without their weights: what ``unicp rehearse`` builds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import UnicpError, unknown
from ..policies.adacache import AdaCacheConfig
from ..policies.budget import BudgetConfig
from ..policies.config import Config
from ..policies.schedule import ScheduleConfig
from ..policies.unicp import UniCPConfig


class Stub(SimpleNamespace):
    """Stands for a component of which a pipeline asks a few numbers."""


Embeddings = Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as its authors published it.

    Attributes:
        name: on the command line.
        source: where its configuration is from.
        kind: class of its transformer, in diffusers or as ``module:class``.
        config: of the transformer; what is not named is as the class has it.
        pipeline: class of its pipeline, likewise.
        parts: makes what the pipeline has besides transformers, given the first of these; what is not named is None.
        embeddings: arguments of the pipeline's call that stand for prompts, from the transformer and a device.
        sizes: width and height at 480p and at 720p, as near as the model's patches allow.
        frames, steps: what its authors generate.
        call: further arguments of the pipeline's call.
        denoisers: how many transformers it has.
    """

    name: str
    source: str
    kind: str
    config: Mapping[str, Any]
    pipeline: str
    parts: Callable[[Any], dict[str, Any]]
    embeddings: Embeddings
    sizes: Mapping[str, tuple[int, int]]
    frames: int
    steps: int = 50
    call: Mapping[str, Any] = field(default_factory=dict)
    denoisers: int = 1

    def build(self, device: Any, **changes: Any) -> Any:
        """The pipeline, its transformers on a device, in the precision ``from_pretrained`` gives them in bfloat16.

        Args:
            changes: of the transformer's configuration.

        Raises:
            UnicpError: its classes are not installed.
        """
        transformer, pipeline = self.found(self.kind), self.found(self.pipeline)
        made = [half_precision(transformer, {**self.config, **changes}, device) for _ in range(self.denoisers)]
        none = {"tokenizer": None, "text_encoder": None, "vae": None}
        second = {"transformer_2": made[1]} if len(made) > 1 else {}
        pipe = pipeline(**{**none, **self.parts(made[0])}, transformer=made[0], **second)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def found(self, path: str) -> Any:
        """A class, in diffusers or as ``module:class``.

        Raises:
            UnicpError: it is not installed.
        """
        module, _, name = path.rpartition(":")
        if not module:
            return of_diffusers(name, self.name)
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            raise UnicpError(
                f"{self.name} needs {name}, which diffusers does not have and a wheel of unicp neither: in the root "
                f"folder of a checkout of unicp's repository, run python -m unicp rehearse --model {self.name}"
            ) from None


def of_diffusers(name: str, asked: str) -> Any:
    """A class of diffusers.

    Args:
        name: of the class.
        asked: what needs it, for the error.

    Raises:
        UnicpError: the installed diffusers has none of that name.
    """
    import diffusers

    try:
        return getattr(diffusers, name)
    except AttributeError:
        raise UnicpError(f"{asked} needs {name}, which diffusers {diffusers.__version__} does not have") from None


def half_precision(kind: Any, config: Mapping[str, Any], device: Any) -> Any:
    """A transformer in bfloat16, but for what its class keeps in float32."""
    with torch.device(device):
        model = kind(**config)
    keep = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if keep.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def _half(*shape: int, device: Any) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, device=device)


def _pairs(words: int | str, width: Callable[[Any], int], mask: str | None = None, dtype: Any = None) -> Embeddings:
    """Embeddings of prompt and negative prompt, with their masks if the pipeline wants some.

    Args:
        words: how many there are, or the field of the transformer's configuration that says it.
        width: channels of each.
        mask: name of the masks' argument.
        dtype: of the masks.
    """

    def made(transformer: Any, device: Any) -> dict[str, Any]:
        found, count = {}, transformer.config[words] if isinstance(words, str) else words
        for prefix in ("", "negative_"):
            found[f"{prefix}prompt_embeds"] = _half(1, count, width(transformer), device=device)
            if mask is not None:
                found[f"{prefix}{mask}"] = torch.ones(1, count, dtype=dtype or torch.int64).to(device)
        return found

    return made


def _having(**parts: Any) -> Callable[[Any], dict[str, Any]]:
    """Parts of a pipeline; its scheduler is made anew for each."""
    return lambda transformer: {key: value() if key == "scheduler" else value for key, value in parts.items()}


def _unipc(shift: float) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)

    return make


def _euler(**config: Any) -> Callable[[], Any]:
    def make() -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**config)

    return make


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
}
WAN_14B = {**WAN, "num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
WAN_EMBEDDINGS = _pairs(512, lambda model: model.config.text_dim)
SIZES = {"480p": (832, 480), "720p": (1280, 720)}


def _hunyuan_embeddings(transformer: Any, device: Any) -> dict[str, Any]:
    config = transformer.config
    return {
        "prompt_embeds": _half(1, 256, config.text_embed_dim, device=device),
        "pooled_prompt_embeds": _half(1, config.pooled_projection_dim, device=device),
        "prompt_attention_mask": torch.ones(1, 256, dtype=torch.int64).to(device),
    }


def _hunyuan15(transformer: Any) -> dict[str, Any]:
    from diffusers.guiders import ClassifierFreeGuidance

    return {
        "scheduler": _euler(shift=7.0)(),
        "vae": Stub(temporal_compression_ratio=4, spatial_compression_ratio=16, config=Stub(latent_channels=32)),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def _hunyuan15_embeddings(transformer: Any, device: Any) -> dict[str, Any]:
    config, found = transformer.config, {}
    for prefix in ("", "negative_"):
        found[f"{prefix}prompt_embeds"] = _half(1, 1000, config.text_embed_dim, device=device)
        found[f"{prefix}prompt_embeds_mask"] = torch.ones(1, 1000, dtype=torch.int64).to(device)
        found[f"{prefix}prompt_embeds_2"] = _half(1, 256, config.text_embed_2_dim, device=device)
        found[f"{prefix}prompt_embeds_mask_2"] = torch.ones(1, 256, dtype=torch.int64).to(device)
    return found


def _ltx2(transformer: Any) -> dict[str, Any]:
    one, none = torch.ones(1), torch.zeros(1)
    channels, compression = 8, 4
    bins = transformer.config.audio_in_channels // channels * compression
    sound = Stub(mel_bins=bins, latent_channels=channels, sample_rate=16000, mel_hop_length=160)
    return {
        "scheduler": _euler()(),
        "vae": Stub(
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
            latents_mean=none,
            latents_std=one,
            config=Stub(scaling_factor=1.0),
        ),
        "audio_vae": Stub(
            mel_compression_ratio=compression,
            temporal_compression_ratio=4,
            latents_mean=none,
            latents_std=one,
            config=sound,
        ),
        "connectors": _Connectors(),
        "vocoder": None,
    }


class _Connectors:
    """Hands the text on as it is."""

    def __call__(self, embeds: Any, mask: Any, padding_side: str = "left") -> Any:
        return embeds, embeds, mask


def _cogvideox_scheduler() -> Any:
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def _open_sora(transformer: Any) -> dict[str, Any]:
    class Words:
        def __call__(self, prompts: list[str], max_length: int, **_: Any) -> Any:
            ids = torch.ones(len(prompts), max_length, dtype=torch.int64)
            return Stub(input_ids=ids, attention_mask=ids)

    class Encoder:
        def __call__(self, ids: Any, mask: Any) -> Any:
            device = next(transformer.parameters()).device
            return Stub(last_hidden_state=_half(*ids.shape, 4096, device=device))

    # 17 frames are 5 latents: 117 frames are 35, as of ratio 3.4; the pipeline takes whole ratios only.
    vae = Stub(spatial_compression_ratio=8, temporal_compression_ratio=4)
    return {"tokenizer": Words(), "text_encoder": Encoder(), "vae": vae, "scheduler": _euler(shift=3.0)()}


MODELS = {
    model.name: model
    for model in (
        Published(
            name="wan-1.3b",
            source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            kind="WanTransformer3DModel",
            config={**WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
            pipeline="WanPipeline",
            parts=_having(scheduler=_unipc(3.0)),
            embeddings=WAN_EMBEDDINGS,
            sizes=SIZES,
            frames=81,
            call={"guidance_scale": 5.0},
        ),
        Published(
            name="wan-14b",
            source="Wan-AI/Wan2.1-T2V-14B-Diffusers",
            kind="WanTransformer3DModel",
            config=WAN_14B,
            pipeline="WanPipeline",
            parts=_having(scheduler=_unipc(5.0)),
            embeddings=WAN_EMBEDDINGS,
            sizes=SIZES,
            frames=81,
            call={"guidance_scale": 5.0},
        ),
        Published(
            name="wan2.2-a14b",
            source="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            kind="WanTransformer3DModel",
            config=WAN_14B,
            pipeline="WanPipeline",
            parts=_having(scheduler=_unipc(3.0), boundary_ratio=0.875),
            embeddings=WAN_EMBEDDINGS,
            sizes=SIZES,
            frames=81,
            steps=40,
            call={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
            denoisers=2,
        ),
        Published(
            name="hunyuan-video",
            source="hunyuanvideo-community/HunyuanVideo",
            kind="HunyuanVideoTransformer3DModel",
            config={
                "in_channels": 16,
                "out_channels": 16,
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "num_layers": 20,
                "num_single_layers": 40,
                "num_refiner_layers": 2,
                "mlp_ratio": 4.0,
                "patch_size": 2,
                "patch_size_t": 1,
                "qk_norm": "rms_norm",
                "guidance_embeds": True,
                "text_embed_dim": 4096,
                "pooled_projection_dim": 768,
                "rope_theta": 256.0,
                "rope_axes_dim": (16, 56, 56),
            },
            pipeline="HunyuanVideoPipeline",
            parts=_having(scheduler=_euler(shift=7.0), text_encoder_2=None, tokenizer_2=None),
            embeddings=_hunyuan_embeddings,
            sizes={"480p": (848, 480), "720p": (1280, 720)},
            frames=129,
            call={"guidance_scale": 6.0},
        ),
        Published(
            name="hunyuan-video-1.5",
            source="hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-720p_t2v",
            kind="HunyuanVideo15Transformer3DModel",
            config={},
            pipeline="HunyuanVideo15Pipeline",
            parts=_hunyuan15,
            embeddings=_hunyuan15_embeddings,
            sizes={"480p": (848, 480), "720p": (1280, 720)},
            frames=121,
        ),
        Published(
            name="ltx",
            source="Lightricks/LTX-Video",
            kind="LTXVideoTransformer3DModel",
            config={},
            pipeline="LTXPipeline",
            parts=_having(scheduler=_euler()),
            embeddings=_pairs(128, lambda model: model.config.caption_channels, "prompt_attention_mask"),
            sizes={"480p": (704, 480), "720p": (1280, 704)},
            frames=161,
            call={"guidance_scale": 3.0},
        ),
        Published(
            name="ltx-2",
            source="Lightricks/LTX-2",
            kind="LTX2VideoTransformer3DModel",
            config={"perturbed_attn": True},
            pipeline="LTX2Pipeline",
            parts=_ltx2,
            embeddings=_pairs(1024, lambda model: model.config.caption_channels, "prompt_attention_mask"),
            sizes={"480p": (768, 512), "720p": (1280, 704)},
            frames=121,
            steps=40,
        ),
        Published(
            name="cogvideox-5b",
            source="zai-org/CogVideoX-5b",
            kind="CogVideoXTransformer3DModel",
            config={
                "num_attention_heads": 48,
                "attention_head_dim": 64,
                "num_layers": 42,
                "text_embed_dim": 4096,
                "time_embed_dim": 512,
                "use_rotary_positional_embeddings": True,
            },
            pipeline="CogVideoXPipeline",
            parts=_having(scheduler=_cogvideox_scheduler),
            embeddings=_pairs("max_text_seq_length", lambda model: model.config.text_embed_dim),
            sizes={"480p": (720, 480), "720p": (1360, 768)},
            frames=49,
            call={"guidance_scale": 6.0},
        ),
        Published(
            name="mochi",
            source="genmo/mochi-1-preview",
            kind="MochiTransformer3DModel",
            config={},
            pipeline="MochiPipeline",
            parts=_having(scheduler=_euler(invert_sigmas=True)),
            embeddings=_pairs(256, lambda model: model.config.text_embed_dim, "prompt_attention_mask", torch.bool),
            sizes={"480p": (848, 480), "720p": (1280, 720)},
            frames=163,
            steps=64,
            call={"guidance_scale": 4.5},
        ),
        Published(
            name="open-sora",
            source="hpcai-tech/OpenSora-STDiT-v3",
            kind="zoo.open_sora:STDiT3",
            config={
                "hidden_size": 1152,
                "num_heads": 16,
                "depth": 28,
                "in_channels": 4,
                "caption_channels": 4096,
            },
            pipeline="zoo.open_sora:OpenSoraPipeline",
            parts=_open_sora,
            embeddings=lambda model, device: {"prompt": "", "max_sequence_length": 300},
            sizes={"480p": (848, 480), "720p": (1280, 720)},
            frames=117,
            steps=30,
            call={"guidance_scale": 7.0},
        ),
    )
}
"""By name."""


def published(name: str) -> Published:
    """A published model by its name.

    Raises:
        UnicpError: there is none of that name.
    """
    if name not in MODELS:
        raise unknown("model", name, list(MODELS))
    return MODELS[name]


UNICP = "unicp, all"


def configs() -> dict[str, Config]:
    """What a rehearsal tries where no method is named: one config of each, at its defaults or about twice as fast."""
    return {
        "schedule": ScheduleConfig(interval=2, fill="linear"),
        "budget": BudgetConfig(target_speedup=2),
        "adacache": AdaCacheConfig(),
        "unicp, self-attention": UniCPConfig(target_speedup=1.4, delta_cross=0, delta_mlp=0),
        UNICP: UniCPConfig(target_speedup=2),
    }
