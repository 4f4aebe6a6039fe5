"""Real diffusers pipelines with tiny random weights: one entry a family in ``FAMILIES``, and nothing else to add.

No text encoder and no VAE: prompts are embeddings, and what a run returns are its latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

STEPS = 10
LAYERS = 3


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of pipeline, and what a test has to know of its structure without asking ``unicp.specs``.

    Attributes:
        build: makes the pipeline; twice the same weights.
        call: the arguments of the pipeline's call for a request.
        size, frames: the usual request, in pixels and frames.
        other: arguments of ``generate`` that give another shape, by what is different.
        width: channels of a token.
        branches: guidance branches as records name them, in the order of the calls.
        rows: rows of the denoiser's batch for each prompt.
        blocks: all blocks of a denoiser in the order in which they run.
        entrance: submodule of the denoiser that a call runs before the blocks.
        denoisers: names of the denoisers in the pipeline.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[..., dict[str, Any]]
    size: int
    frames: int
    other: Mapping[str, Mapping[str, Any]]
    width: int
    branches: tuple[str, ...]
    rows: int
    blocks: Callable[[Any], list[Any]]
    entrance: str
    denoisers: tuple[str, ...] = ("transformer",)
    streams: int = 1
    text: int = 16
    kinds: tuple[str, ...] = field(default=("self_attention", "mlp", "block"))

    def generate(
        self,
        pipe: Any,
        *,
        steps: int = STEPS,
        seed: int = 0,
        prompts: tuple[int, ...] = (1,),
        size: int | None = None,
        frames: int | None = None,
        guidance: bool = True,
        callback: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """The latents of one run. A prompt is a number; negative prompts follow from it."""
        latents: torch.Tensor = self.run(
            pipe,
            lambda run, **call: run(**call).frames,
            steps=steps,
            prompts=prompts,
            size=size,
            frames=frames,
            guidance=guidance,
            callback_on_step_end=callback,
            generator=torch.Generator().manual_seed(seed),
        )
        return latents

    def run(
        self,
        pipe: Any,
        verb: Callable[..., Any],
        *,
        steps: int = STEPS,
        prompts: tuple[int, ...] = (1,),
        size: int | None = None,
        frames: int | None = None,
        guidance: bool = True,
        **more: Any,
    ) -> Any:
        """What ``verb`` makes of the pipeline and the arguments of such a run."""

        def embeddings(first: int) -> torch.Tensor:
            noise = [torch.randn(8, self.text, generator=torch.Generator().manual_seed(first + p)) for p in prompts]
            return torch.stack(noise)

        size = size or self.size
        return verb(
            pipe,
            prompt_embeds=embeddings(0),
            negative_prompt_embeds=embeddings(100),
            height=size,
            width=size,
            num_inference_steps=steps,
            guidance_scale=4.0 if guidance else 1.0,
            output_type="latent",
            **self.call(frames or self.frames, len(prompts)),
            **more,
        )


def denoisers(family: Family, pipe: Any) -> list[Any]:
    return [getattr(pipe, name) for name in family.denoisers]


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def _wan(second: bool = False) -> WanPipeline:
    # The boundary lies between steps 4 and 5 of 10.
    more = {"transformer_2": wan_transformer(seed=1), "boundary_ratio": 0.78} if second else {}
    return _quiet(
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
    return _quiet(
        LTXPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    )


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
    return _quiet(
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
    return _quiet(
        LattePipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=DDIMScheduler())
    )


def _alternating(denoiser: Any) -> list[Any]:
    pairs = zip(denoiser.transformer_blocks, denoiser.temporal_transformer_blocks, strict=True)
    return [block for pair in pairs for block in pair]


_WAN = Family(
    name="wan",
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
        Family(
            name="ltx",
            build=_ltx,
            call=lambda frames, prompts: {
                "num_frames": frames,
                "prompt_attention_mask": torch.ones(prompts, 8),
                "negative_prompt_attention_mask": torch.ones(prompts, 8),
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
    )
}
"""Every family that the contract is run for, by name."""
