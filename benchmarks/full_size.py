"""Speed and memory of the published video models at their full size, with random weights: nothing to download.

    python -m benchmarks.full_size [--models wan-1.3b,wan-14b,hunyuan-video] [--steps 20] [--repeats 1] [--minutes 8]

Random weights cost as much time and memory as trained ones, but their videos are noise: nothing is said of quality, and
only plans that do not depend on what is measured are compared. Latents are not decoded, prompts are random embeddings,
so times are of the denoising loop. Every method takes its turn after the unaccelerated pipeline, and beside what was
measured stands what a rehearsal says: speed-up, bytes kept, reads of the device. Then the budget against the bare
pipeline where blocks are compiled, run as CUDA graphs, and offloaded in groups with streams; and sliced attention
against full, module by module. What no longer fits into the minutes is left out, and named.

Needs a GPU that holds the model in bfloat16 (29 GB for wan-14b, 26 GB for hunyuan-video, 3 GB for wan-1.3b, plus
activations; twice the weights while they are made). ``--tiny`` runs the same script on models of a few layers and
channels, on any machine; its figures mean nothing and are not saved.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Sequence
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
from benchmarks import common, slicing
from unicp.bench import harness
from unicp.offline import pretend, rehearse
from unicp.offline.published import MODELS as PUBLISHED
from unicp.offline.published import half_precision
from unicp.tensors.private import COMPILED_CALL

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
IN_WAYS = ("unaccelerated", "budget, 2x")
"""The plans that are compared in each of the ways to run a transformer."""
LENGTHS, TINY_LENGTHS = (32_760, 75_600), (256,)
"""Tokens of the modules that are sliced: of Wan at 480p and at 720p."""
RANKS = (32, 64, 96)
SLICED_HEADS = 12
"""As Wan 1.3B has them, of size 128."""


class Minutes:
    """The time there is. What would not fit is not begun.

    Args:
        minutes: of all measurements together.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes
        self.left_out: list[str] = []

    def fits(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; what does not fit is kept by name."""
        if time.perf_counter() + seconds < self._end:
            return True
        self.left_out.append(what)
        return False


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


def uncompiled(transformer: Any) -> None:
    for module in transformer.modules():
        module.__dict__.pop(COMPILED_CALL, None)
    torch._dynamo.reset()


class Bench:
    """A model at full size, and what was measured of it.

    Args:
        model: the published one.
        steps: of a run.
        tiny: whether a small one takes its place.
        device: where it runs.
        minutes: the time there is.
    """

    def __init__(self, model: Model, *, steps: int, tiny: bool, device: str, minutes: Minutes) -> None:
        self.model, self.steps, self.tiny, self.device, self.minutes = model, steps, tiny, device, minutes
        self.size = TINY_SIZE if tiny else model.size
        self.transformer = model.build(tiny=tiny, device=device)
        self.pipe = model.pipeline(self.transformer)
        self.pipe.set_progress_bar_config(disable=True)
        height, width, frames = self.size
        given = {
            name: value.to(device, torch.bfloat16 if value.is_floating_point() else value.dtype)
            for name, value in model.embeddings(self.transformer, TINY_WORDS if tiny else None).items()
        }
        self._call = {"height": height, "width": width, "num_frames": frames, **model.call, **given}
        self._step_seconds = 0.0  # of the bare pipeline

    def once(self, plan: str, steps: int | None = None) -> dict[str, Any]:
        """One run: seconds of its loop, its peak beyond the weights, and what its report says."""
        config, steps = PLANS[plan], steps or self.steps
        session = unicp.accelerate(self.pipe, config) if config is not None else None
        generator = torch.Generator().manual_seed(0)
        call = {**self._call, "num_inference_steps": steps}
        _, made = harness.run(self.pipe, call, generator=generator, output_type="latent")
        found: dict[str, Any] = {"loop_seconds": made.loop_seconds, "peak_bytes_beyond_weights": made.peak_bytes}
        if session is not None:
            report = session.report()
            found |= {"computed_fraction": report.computed_fraction, "cache_bytes": report.cache_bytes}
            unicp.restore(self.pipe)
        gc.collect()
        return found

    def compared(self, plans: Sequence[str], repeats: int, what: str = "") -> dict[str, dict[str, Any]]:
        """Plans in turns, the bare pipeline first in each, and each after a short run of its own; what fits of it."""
        known: dict[str, dict[str, Any]] = {}
        self.once("unaccelerated", SHORT)
        self._step_seconds = self.once("unaccelerated", SHORT)["loop_seconds"] / SHORT
        for turn in range(repeats):
            for plan in plans:
                steps = self.steps + (0 if turn else SHORT)
                if not self.minutes.fits(f"{self.model.name}: {what}{plan}", steps * self._step_seconds):
                    continue
                if not turn:
                    self.once(plan, SHORT)
                made, before = self.once(plan), known.get(plan, {}).get("loop_seconds", [])
                known[plan] = {**made, "loop_seconds": [*before, made["loop_seconds"]]}
        for each in known.values():
            count = len(each["loop_seconds"])
            each["speedup"] = common.ratios(known["unaccelerated"]["loop_seconds"][:count], each["loop_seconds"])
        return known

    def reads(self, plan: str) -> int | None:
        """How often a run waits for the device; ``None`` on devices that do not tell."""
        if self.device != "cuda":
            return None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.once(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(each.message) for each in caught)

    def in_ways(self, repeats: int) -> dict[str, Any]:
        """The budget against the bare pipeline, in each way of running a transformer; or why it does not run so."""
        found: dict[str, Any] = {}
        for name, begin in WAYS.items():
            # Compiling takes about as long as some dozen steps.
            if not self.minutes.fits(f"{self.model.name}: {name}", (2 * self.steps + 12) * self._step_seconds):
                continue
            try:
                begin(self)
                found[name] = self.compared(IN_WAYS, repeats, f"{name}, ")
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                unicp.restore(self.pipe)
            uncompiled(self.transformer)
        return found


def _compile(bench: Bench, mode: str | None = None) -> None:
    options = {"backend": "eager"} if bench.tiny else {"mode": mode}
    bench.transformer.compile_repeated_blocks(fullgraph=True, **options)


def _offload(bench: Bench) -> None:
    streams = {"use_stream": True} if bench.device == "cuda" else {}
    onload, offload = torch.device(bench.device), torch.device("cpu")
    bench.transformer.enable_group_offload(onload, offload, offload_type="leaf_level", **streams)


WAYS: dict[str, Callable[[Bench], None]] = {
    "compiled blocks": _compile,
    "compiled blocks, CUDA graphs": lambda bench: _compile(bench, "reduce-overhead"),
    "group offload with streams": _offload,  # the last: it is not undone
}
"""Ways of running a transformer, beside which a method has to pay."""


def measure(model: Model, *, steps: int, repeats: int, tiny: bool, device: str, minutes: Minutes) -> dict[str, Any]:
    """What a model's methods cost and save, what was rehearsed of it, and what the budget saves in other ways."""
    bench = Bench(model, steps=steps, tiny=tiny, device=device, minutes=minutes)
    found = bench.compared(list(PLANS), repeats)
    for name, figures in model.rehearsed(bench.size, steps, tiny=tiny).items():
        if name in found:
            found[name]["rehearsed"] = figures
    for plan in IN_WAYS:
        if plan in found and bench.minutes.fits(f"{model.name}: reads of {plan}", found[plan]["loop_seconds"][-1]):
            found[plan]["reads"] = bench.reads(plan)
    height, width, frames = bench.size
    about = {"config": PUBLISHED[model.name].source, "height": height, "width": width, "frames": frames, "steps": steps}
    parameters = list(bench.transformer.parameters())
    return {
        **about,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "plans": found,
        "ways": bench.in_ways(repeats),
    }


def show(name: str, figures: dict[str, Any]) -> None:
    """A table, a line a plan."""
    size = f"{figures['width']}x{figures['height']}, {figures['frames']} frames, {figures['steps']} steps"
    print(f"{name}: {figures['parameters'] / 1e9:.2f} billion parameters, {size}")
    for plan, each in _lines(figures):
        if "failed" in each:
            print(f"  {plan:<30} did not run: {each['failed']}")
            continue
        peak, kept = (each.get(key) for key in ("peak_bytes_beyond_weights", "cache_bytes"))
        print(
            f"  {plan:<30} {each['loop_seconds'][-1]:8.2f} s {each['speedup']['median']:6.3f}x"
            + (f"  computed {each['computed_fraction']:.0%}" if "computed_fraction" in each else "")
            + (f"  peak {peak / 2**30:.2f} GiB beyond the weights" if peak is not None else "")
            + (f"  kept {kept / 2**20:.1f} MiB" if kept else "")
            + (f"  rehearsed {each['rehearsed']['speedup']:.2f}x" if "rehearsed" in each else "")
            + (f"  {each['reads']} reads" if each.get("reads") is not None else "")
        )


def _lines(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    lines = list(figures["plans"].items())
    for way, plans in figures["ways"].items():
        lines += [(way, plans)] if "failed" in plans else [(f"{way}: {plan}", each) for plan, each in plans.items()]
    return lines


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and save; with ``--tiny`` only print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8, help="of all measurements together")
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, on any machine")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("full-size models need a GPU; --tiny shows on any machine that the script runs")
    unknown = set(args.models.split(",")) - set(MODELS)
    if unknown:
        raise SystemExit(f"unknown model {sorted(unknown)[0]!r}; known: {', '.join(MODELS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    minutes, figures, sliced = Minutes(args.minutes), dict[str, Any](), list[dict[str, Any]]()

    def keep() -> None:  # after each: the next may not fit
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
        if not args.tiny:
            common.save("full-size", {"models": figures, "sliced": sliced, "left_out": minutes.left_out})

    for tokens in TINY_LENGTHS if args.tiny else LENGTHS:  # first: they take seconds, and models the rest
        if minutes.fits(f"attention of {tokens} tokens", 0):
            dtype = torch.float32 if args.tiny else torch.bfloat16
            sliced += slicing.measure(tokens, SLICED_HEADS, list(RANKS), 5, torch.device(device), dtype)
            keep()
    for name in args.models.split(","):
        if not minutes.fits(f"{name}: everything", 0):
            continue
        figures[name] = measure(
            MODELS[name], steps=args.steps, repeats=args.repeats, tiny=args.tiny, device=device, minutes=minutes
        )
        show(name, figures[name])
        keep()
    if minutes.left_out:
        print(f"left out, for want of time: {'; '.join(dict.fromkeys(minutes.left_out))}")
    return figures


if __name__ == "__main__":
    main()
