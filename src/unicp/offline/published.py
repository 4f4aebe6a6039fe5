"""The published video models, as they are configured, without their weights: what ``unicp rehearse`` builds."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import UnicpError, unknown
from ..policies import Config
from ..policies.adacache import AdaCacheConfig
from ..policies.budget import BudgetConfig
from ..policies.schedule import ScheduleConfig
from ..policies.unicp import UniCPConfig

Embeddings = Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as its authors published it.

    Attributes:
        name: on the command line.
        source: where its configuration is from.
        kind: class of its transformer, in diffusers or as ``module:class``.
        config: of the transformer; what is not named is as the class has it.
        pipeline: makes the pipeline from its transformers, one or two.
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
    pipeline: Callable[..., Any]
    embeddings: Embeddings
    sizes: Mapping[str, tuple[int, int]]
    frames: int
    steps: int = 50
    call: Mapping[str, Any] = field(default_factory=dict)
    denoisers: int = 1

    def transformer_class(self) -> Any:
        """The class of its transformer.

        Raises:
            UnicpError: it is not installed.
        """
        module, _, name = self.kind.rpartition(":")
        try:
            return getattr(importlib.import_module(module or "diffusers"), name)
        except (ImportError, AttributeError):
            where = "this diffusers" if not module else "a checkout of unicp's repository only, in its root folder"
            raise UnicpError(f"{self.name} needs {name}, which is in {where}") from None

    def build(self, device: Any, **changes: Any) -> Any:
        """The pipeline, its transformers on a device, in the precision ``from_pretrained`` gives them in bfloat16.

        Args:
            changes: of the transformer's configuration.
        """
        made = [
            half_precision(self.transformer_class(), {**self.config, **changes}, device) for _ in range(self.denoisers)
        ]
        pipe = self.pipeline(*made)
        pipe.set_progress_bar_config(disable=True)
        return pipe


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


def _pairs(words: int, width: Callable[[Any], int], mask: str | None = None, dtype: Any = None) -> Embeddings:
    """Embeddings of prompt and negative prompt, with their masks if the pipeline wants some."""

    def made(transformer: Any, device: Any) -> dict[str, Any]:
        found = {}
        for prefix in ("", "negative_"):
            found[f"{prefix}prompt_embeds"] = _half(1, words, width(transformer), device=device)
            if mask is not None:
                found[f"{prefix}{mask}"] = torch.ones(1, words, dtype=dtype or torch.int64).to(device)
        return found

    return made


def _of(name: str, **parts: Any) -> Callable[..., Any]:
    """Makes pipelines of a class of diffusers, with nothing in them but transformer and scheduler."""

    def make(*transformers: Any) -> Any:
        import diffusers

        kind = getattr(diffusers, name, None)
        if kind is None:
            raise UnicpError(f"diffusers {diffusers.__version__} has no {name}; update it")
        given = {key: value() if callable(value) else value for key, value in parts.items()}
        missing = {"tokenizer": None, "text_encoder": None, "vae": None}
        second = {"transformer_2": transformers[1]} if len(transformers) > 1 else {}
        return kind(**{**missing, **given, "transformer": transformers[0], **second})

    return make


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

MODELS = {
    model.name: model
    for model in (
        Published(
            name="wan-1.3b",
            source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            kind="WanTransformer3DModel",
            config={**WAN, "num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
            pipeline=_of("WanPipeline", scheduler=_unipc(3.0)),
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
            pipeline=_of("WanPipeline", scheduler=_unipc(5.0)),
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
            pipeline=_of("WanPipeline", scheduler=_unipc(3.0), boundary_ratio=0.875),
            embeddings=WAN_EMBEDDINGS,
            sizes=SIZES,
            frames=81,
            steps=40,
            call={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
            denoisers=2,
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
        raise unknown("model", name, [*MODELS, "PATH"])
    return MODELS[name]


def stub(**values: Any) -> Any:
    """Stands for a component of which a pipeline asks a few numbers."""
    return SimpleNamespace(**values)


def configs() -> dict[str, Config]:
    """What a rehearsal tries where no method is named: one config of each, at its defaults or about twice as fast."""
    return {
        "schedule": ScheduleConfig(interval=2, fill="linear"),
        "budget": BudgetConfig(target_speedup=2),
        "adacache": AdaCacheConfig(),
        "unicp, self-attention": UniCPConfig(delta_cross=0, pcas=False),
        "unicp, all": UniCPConfig(delta_mlp=0.1, pcas=False),
    }
