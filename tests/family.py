"""What a test has to know of a kind of pipeline, and a pipeline for transformers whose own one needs more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.utils import _pytree as pytree

CONSTRAINTS = (Path(__file__).resolve().parent.parent / "constraints.txt").read_text("utf-8")
OLDER = f"diffusers=={diffusers.__version__}" not in CONSTRAINTS.splitlines()
"""The tests run on another release of diffusers than the pinned one: ``make test-compat``."""

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
        streams: tensors that a block takes and returns.
        kept: how many of them the model goes on to use, if not all.
        text: width of a prompt's embedding.
        kinds: what a policy may measure.
        attention, query: path of a block's first attention module and name of that one's projection of queries.
        guide: the argument of the pipeline's call that sets the strength of guidance.
        embeds: its arguments for the embeddings of prompts and negative prompts.
        callbacks: whether it takes ``callback_on_step_end``.
        slices: whether any of its attention can be sliced.
        primary: every case of the contract is run for it, and every other test; a few of them otherwise.
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
    kept: int | None = None
    text: int = 16
    kinds: tuple[str, ...] = field(default=("self_attention", "mlp", "block"))
    attention: str = "attn1"
    query: str = "to_q"
    guide: str | None = "guidance_scale"
    embeds: tuple[str, str] = ("prompt_embeds", "negative_prompt_embeds")
    callbacks: bool = True
    slices: bool = True
    primary: bool = False

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
        more = {} if callback is None else {"callback_on_step_end": callback}
        latents: torch.Tensor = self.run(
            pipe,
            lambda run, **call: run(**call).frames,
            steps=steps,
            prompts=prompts,
            size=size,
            frames=frames,
            guidance=guidance,
            generator=torch.Generator().manual_seed(seed),
            **more,
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
        guide = {} if self.guide is None else {self.guide: 4.0 if guidance else 1.0}
        return verb(
            pipe,
            **{self.embeds[0]: embeddings(0), self.embeds[1]: embeddings(100)},
            **guide,
            height=size,
            width=size,
            num_inference_steps=steps,
            output_type="latent",
            **self.call(frames or self.frames, len(prompts)),
            **more,
        )


def part(name: str) -> Any:
    """A class of diffusers. In an older release than the pinned one, a test of what it does not have yet is skipped."""
    found = getattr(diffusers, name, None)
    if found is None and OLDER:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return found if found is not None else getattr(diffusers, name)


def denoisers(family: Family, pipe: Any) -> list[Any]:
    return [getattr(pipe, name) for name in family.denoisers]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def masks(prompts: int) -> dict[str, torch.Tensor]:
    """Attention masks for the embeddings of ``Family.run``: everything counts."""
    return {"prompt_attention_mask": torch.ones(prompts, 8), "negative_prompt_attention_mask": torch.ones(prompts, 8)}


def lively(module: Any) -> Any:
    """Random numbers for parameters that begin as zeros: a block that adds nothing tests nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module


def moved(values: Any, device: torch.device) -> Any:
    """Arguments of a call, with their tensors on a device; those that are there stay the same objects."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), values)


class Stub(SimpleNamespace):
    """Stands in for a component of which a pipeline wants a few numbers."""


class Loop(DiffusionPipeline):
    """A text-to-video loop without text encoder and VAE that sets no cache context.

    Args:
        transformer, scheduler: its components.
        inputs: the transformer's arguments from latents (B, C, F, H, W) or (B, F, C, H, W), timestep and embeddings.
        frames_first: latents are (B, F, C, H, W).
    """

    def __init__(self, transformer: Any, scheduler: Any, inputs: Any = None, frames_first: bool = False) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._inputs = inputs
        self._frames_first = frames_first

    @torch.no_grad()
    def __call__(
        self,
        *,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator,
        output_type: str = "latent",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> Any:
        self._interrupt = False
        shape: tuple[int, ...] = (len(prompt_embeds), 4, (num_frames - 1) // 4 + 1, height // 8, width // 8)
        if self._frames_first:
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        device = prompt_embeds.device
        latents = torch.randn(shape, generator=generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        branches = [prompt_embeds, negative_prompt_embeds] if guidance_scale > 1 else [prompt_embeds]
        for i, t in enumerate(self.scheduler.timesteps):
            if self._interrupt:
                continue
            timestep = t.expand(len(latents))
            calls = [self._inputs(latents, timestep, embeds) for embeds in branches]
            outputs = [self.transformer(**moved(call, device)) for call in calls]
            cond, *uncond = [output[0] if isinstance(output, tuple) else output for output in outputs]
            velocity = uncond[0] + guidance_scale * (cond - uncond[0]) if uncond else cond
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": latents})
        return SimpleNamespace(frames=latents)


def loop(transformer: Any, inputs: Callable[..., dict[str, Any]], frames_first: bool = False) -> Loop:
    return quiet(Loop(transformer, FlowMatchEulerDiscreteScheduler(), inputs, frames_first))
