"""Speed and memory of the published video models at their full size, with random weights: nothing to download.

    python -m benchmarks.full_size [--models wan-1.3b,wan-14b,hunyuan-video] [--steps 20] [--repeats 1]

Random weights cost as much time and memory as trained ones, but their videos are noise: nothing is said of quality, and
only plans that do not depend on what is measured are compared. Latents are not decoded, prompts are random embeddings,
so times are of the denoising loop. Every method takes its turn after the unaccelerated pipeline.

Needs a GPU that holds the model in bfloat16 (29 GB for wan-14b, 26 GB for hunyuan-video, 3 GB for wan-1.3b, plus
activations; twice the weights while they are made). ``--tiny`` runs the same script on models of a few layers and
channels, on any machine; its figures mean nothing and are not saved.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

import unicp
from benchmarks import common
from unicp.bench import harness
from unicp.offline import pretend, rehearse
from unicp.offline.published import MODELS as PUBLISHED
from unicp.offline.published import half_precision

ACCELERATOR = "h100"
"""For which the speed is projected that is set beside the measured one."""
SHORT = 2
"""Steps of the warm-up."""
PLANS: dict[str, Any] = {
    "unaccelerated": None,
    "adacache, computing all": unicp.AdaCacheConfig(codebook=((1.0, 1),)),
    "adacache, every second step": unicp.AdaCacheConfig(codebook=((1.0, 2),)),
    "schedule, every second step": unicp.ScheduleConfig(interval=2, warmup_steps=1),
    "schedule, every third step": unicp.ScheduleConfig(interval=3, warmup_steps=1),
    "budget, 2x": unicp.BudgetConfig(target_speedup=2),
    "unicp, self-attention": unicp.UniCPConfig(
        delta=1e6, delta_cross=0, delta_mlp=0, max_window=1, warmup_steps=1, pcas=False
    ),
}
"""What is compared. The first has the cost of measuring and nothing gained; the others save a known share."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published model.

    Attributes:
        name: of the published one (:mod:`unicp.offline.published`), which has its configuration.
        tiny: what replaces it with ``--tiny``.
        size: height, width and frames that its authors generate at.
        call: further arguments of the pipeline's call.
        embeddings: what stands for a prompt, of as many words as the pipeline pads to, or of fewer.
    """

    name: str
    kind: Any
    tiny: dict[str, Any]
    size: tuple[int, int, int]
    call: dict[str, Any]
    pipeline: Callable[[Any], Any]
    embeddings: Callable[[Any, int | None], dict[str, Any]]

    def build(self, *, tiny: bool = False, device: str = "cpu") -> Any:
        """The transformer, in the precision ``from_pretrained(dtype=torch.bfloat16)`` gives it."""
        return half_precision(self.kind, {**PUBLISHED[self.name].config, **(self.tiny if tiny else {})}, device)

    def rehearsed(self, size: tuple[int, int, int], steps: int, *, tiny: bool) -> dict[str, dict[str, Any]]:
        """What a rehearsal says of every plan."""
        found = PUBLISHED[self.name]
        found = replace(found, config={**found.config, **(self.tiny if tiny else {})})
        height, width, frames = size
        made = rehearse.rehearse(
            found,
            {name: config for name, config in PLANS.items() if config is not None},
            width=width,
            height=height,
            frames=frames,
            steps=steps,
            device=pretend.DEVICES[ACCELERATOR],
        )
        return {
            name: {
                "computed_fraction": each.computed_fraction,
                "speedup": each.speedup,
                "cache_bytes": each.kept_bytes,
                "peak_bytes_beyond_weights": each.peak_bytes,
                "reads": each.reads,
            }
            for name, each in {"unaccelerated": made.plain, **made.methods}.items()
        }


def _wan(shift: float) -> Callable[[Any], Any]:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )
    return lambda model: WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=scheduler
    )


def _wan_embeddings(transformer: Any, words: int | None) -> dict[str, Any]:
    width = transformer.config.text_dim
    prompt, negative = torch.randn(2, 1, words or 512, width, generator=torch.Generator().manual_seed(0))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}


def _hunyuan(model: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"))
    return HunyuanVideoPipeline(**none, transformer=model, scheduler=scheduler)


def _hunyuan_embeddings(transformer: Any, words: int | None) -> dict[str, Any]:
    config, words, generator = transformer.config, words or 256, torch.Generator().manual_seed(0)
    return {
        "prompt_embeds": torch.randn(1, words, config.text_embed_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "prompt_attention_mask": torch.ones(1, words, dtype=torch.int64),
    }


TINY_WAN: dict[str, Any] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 16,
    "text_dim": 16,
    "freq_dim": 16,
}
MODELS = {
    "wan-1.3b": Model(
        kind=WanTransformer3DModel,
        name="wan-1.3b",
        tiny=TINY_WAN,
        size=(480, 832, 81),
        call={"guidance_scale": 5.0},
        pipeline=_wan(3.0),
        embeddings=_wan_embeddings,
    ),
    "wan-14b": Model(
        kind=WanTransformer3DModel,
        name="wan-14b",
        tiny=TINY_WAN,
        size=(720, 1280, 81),
        call={"guidance_scale": 5.0},
        pipeline=_wan(5.0),
        embeddings=_wan_embeddings,
    ),
    "hunyuan-video": Model(
        kind=HunyuanVideoTransformer3DModel,
        name="hunyuan-video",
        tiny={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        size=(720, 1280, 129),
        call={"guidance_scale": 6.0},
        pipeline=_hunyuan,
        embeddings=_hunyuan_embeddings,
    ),
}
TINY_SIZE, TINY_WORDS = (32, 48, 5), 8


def measure(model: Model, *, steps: int, repeats: int, tiny: bool, device: str) -> dict[str, Any]:
    """Seconds of the denoising loop, memory and computed share of every plan, in turns."""
    transformer = model.build(tiny=tiny, device=device)
    pipe = model.pipeline(transformer)
    pipe.set_progress_bar_config(disable=True)
    height, width, frames = TINY_SIZE if tiny else model.size
    given = {
        name: value.to(device, torch.bfloat16 if value.is_floating_point() else value.dtype)
        for name, value in model.embeddings(transformer, TINY_WORDS if tiny else None).items()
    }
    call = {"height": height, "width": width, "num_frames": frames, **model.call, **given}
    found: dict[str, dict[str, Any]] = {name: {"loop_seconds": []} for name in PLANS}

    def once(name: str, count: int) -> None:
        config = PLANS[name]
        session = unicp.accelerate(pipe, config) if config is not None else None
        generator = torch.Generator().manual_seed(0)
        _, made = harness.run(pipe, {**call, "num_inference_steps": count}, generator=generator, output_type="latent")
        if count == steps:
            found[name]["loop_seconds"].append(made.loop_seconds)
            found[name]["peak_bytes_beyond_weights"] = made.peak_bytes
        if session is not None:
            report = session.report()
            found[name]["computed_fraction"] = report.computed_fraction
            found[name]["cache_bytes"] = report.cache_bytes
            unicp.restore(pipe)
        gc.collect()

    for name in PLANS:
        once(name, SHORT)
    for _ in range(repeats):
        for name in PLANS:
            once(name, steps)
    bare = found["unaccelerated"]["loop_seconds"]
    size = TINY_SIZE if tiny else model.size
    for name, figures in model.rehearsed(size, steps, tiny=tiny).items():
        found[name]["rehearsed"] = figures
    for each in found.values():
        each["speedup"] = common.ratios(bare, each["loop_seconds"])
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
    about = {"config": PUBLISHED[model.name].source, "height": height, "width": width, "frames": frames, "steps": steps}
    return {**about, "parameters": parameters, "weights_bytes": weights, "plans": found}


def show(name: str, figures: dict[str, Any]) -> None:
    """A table, a line a plan."""
    size = f"{figures['width']}x{figures['height']}, {figures['frames']} frames, {figures['steps']} steps"
    print(f"{name}: {figures['parameters'] / 1e9:.2f} billion parameters, {size}")
    for plan, each in figures["plans"].items():
        peak, kept = (each.get(key) for key in ("peak_bytes_beyond_weights", "cache_bytes"))
        print(
            f"  {plan:<30} {each['loop_seconds'][-1]:8.2f} s {each['speedup']['median']:6.3f}x"
            + (f"  computed {each['computed_fraction']:.0%}" if "computed_fraction" in each else "")
            + (f"  peak {peak / 2**30:.2f} GiB beyond the weights" if peak is not None else "")
            + (f"  kept {kept / 2**20:.1f} MiB" if kept else "")
            + f"  rehearsed {each['rehearsed']['speedup']:.2f}x"
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and save; with ``--tiny`` only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, on any machine")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("full-size models need a GPU; --tiny shows on any machine that the script runs")
    unknown = set(args.models.split(",")) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown model {sorted(unknown)[0]!r}; known: {', '.join(MODELS)}")
    figures: dict[str, Any] = {}
    for name in args.models.split(","):
        figures[name] = measure(
            MODELS[name],
            steps=args.steps,
            repeats=args.repeats,
            tiny=args.tiny,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        show(name, figures[name])
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
        if not args.tiny:
            common.save("full-size", {"models": figures})  # after each: the next may not fit
    return figures


if __name__ == "__main__":
    main()
