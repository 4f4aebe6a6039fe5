"""The ComfyUI node on the demo model, behind a stand-in of the program: samplers, and EasyCache's rule beside it.

    python -m benchmarks.comfyui [--only euler dpmpp_2m uni_pc] [--captions 6] [--collect]

For each sampler at 20 steps, each caption: all steps, half of them, `UnicpSpeedup` at a target of 2, and EasyCache
(Zhou et al. 2025, by its public description; ComfyUI's node of that name has these defaults). What is compared is
decoded video, against the same sampler with all steps; what is counted are evaluations of the network, and nothing is
timed. Where computed steps lie was chosen on other captions.

Resumable: latents lie in benchmarks/results/comfyui.parts, a file a run, and processes with different ``--only`` can
share the work. ``--collect`` writes the figures and the picture of what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import unicp
from benchmarks import common, figures
from tests import comfy_stand_in as comfy
from unicp.demo import scenes
from unicp.tensors import metrics

STEPS, SPEED, SHIFT = 20, 2.0, 3.0
SAMPLERS = ("euler", "dpmpp_2m", "uni_pc")
THRESHOLDS = (0.2,)
"""Of EasyCache; 0.2 is ComfyUI's default."""
PARTS = common.RESULTS / "comfyui.parts"
PAGE = Path(__file__).parent.parent / "docs" / "comfyui.md"
BEGIN, END = "<!-- figures: python -m benchmarks.comfyui -->", "<!-- end of figures -->"
PICTURE = Path(__file__).parent.parent / "integrations" / "comfyui" / "unicp.png"


class EasyCache:
    """EasyCache's rule at the network: an old difference of output and input stands in while little should change.

    The rate ``k = |v_i - v_j| / |x_i - x_j|`` of the last two computed steps tells what a change of the latents makes
    of the output. ``k |x - x_i| / |v_i|`` is added up from step to step; below the threshold the step is skipped.

    Args:
        threshold: of the sum.
        start, end: shares of the sampling in which steps may be skipped.
    """

    def __init__(self, threshold: float, sampling: Any, start: float = 0.15, end: float = 0.95) -> None:
        own = sampling.sigmas
        self.begin, self.end = (float(own[int((1 - share) * (len(own) - 1))]) for share in (start, end))
        self.threshold = threshold
        self.differences: dict[Any, Any] = {}  # by condition
        self.latents = self.output = self.rate = self.first = None
        self.total, self.skipping, self.at = 0.0, False, None
        self.skipped = 0

    def __call__(self, executor: Any, x: Any, sigma: Any, context: Any, transformer_options: dict) -> Any:
        ids = transformer_options["uuids"]
        parts = x.chunk(len(ids))
        level = float(sigma[0])
        self.first = self.first or ids[0]
        if self.first in ids:  # it decides for all branches of the step
            self.skipping = self._skips(parts[ids.index(self.first)], level)
        if self.skipping and all(key in self.differences for key in ids):
            self.skipped += len(ids)
            return torch.cat([part + self.differences[key] for part, key in zip(parts, ids, strict=True)])
        output = executor(x, sigma, context, transformer_options=transformer_options)
        for key, part, value in zip(ids, parts, output.chunk(len(ids)), strict=True):
            if key == self.first:
                if self.output is not None:
                    self.rate = (value - self.output).abs().mean() / (part - self.latents).abs().mean()
                self.output, self.latents = value, part
            self.differences[key] = value - part
        return output

    def _skips(self, x: Any, level: float) -> bool:
        if not self.end < level <= self.begin or self.rate is None:
            return False
        self.total += float(self.rate * (x - self.latents).abs().mean() / self.output.abs().mean())
        if self.total < self.threshold:
            return True
        self.total = 0.0
        return False


class Studio:
    """The demo model as ComfyUI would have it, and captions."""

    def __init__(self, captions: list[str]) -> None:
        self.captions, self.pipe = captions, common.pipeline()
        self.sampling = comfy.Flow(SHIFT)
        self.model = comfy.Model(self._velocity, self.sampling)
        self.patcher = comfy.ModelPatcher(self.model)
        with torch.inference_mode():
            self.positive, self.negative = self.pipe.encode_prompt(captions, "", max_sequence_length=512)
            size, channels = (unicp.demo.HEIGHT, unicp.demo.WIDTH), self.pipe.transformer.config.in_channels
            seeds = [torch.Generator().manual_seed(0) for _ in captions]
            self.noise = self.pipe.prepare_latents(
                len(captions), channels, *size, unicp.demo.FRAMES, torch.float32, torch.device("cpu"), seeds
            )

    def _velocity(self, x: Any, sigma: Any, context: Any) -> Any:
        return self.pipe.transformer(x, 1000 * sigma, context, return_dict=False)[0]

    def sample(self, model: comfy.ModelPatcher, sampler: str, steps: int, which: slice) -> tuple[Any, float]:
        """Latents (B, C, T, H, W) of some captions, and how often the network was evaluated for each branch."""
        guider = comfy.CFGGuider(model, self.positive[which], self.negative[which], unicp.demo.GUIDANCE)
        noise, self.model.forwards = self.noise[which], 0
        grid = comfy.levels(self.sampling, sampler, steps)
        made = guider.sample(noise, torch.zeros_like(noise), comfy.sampler_object(sampler), grid)
        return made, self.model.forwards / 2

    @torch.inference_mode()
    def video(self, latents: Any) -> Any:
        """Frames (B, T, C, H, W) from 0 to 1."""
        vae = self.pipe.vae
        shift, scale = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (vae.decode(latents * scale + shift, return_dict=False)[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2)

    # -- what is compared ------------------------------------------------------------------------------------------

    def plain(self, sampler: str, steps: int) -> tuple[Any, list[float]]:
        made, count = self.sample(self.patcher, sampler, steps, slice(None))
        return made, [count] * len(self.captions)

    def sped(self, sampler: str) -> tuple[Any, list[float]]:
        from unicp.hosts.comfyui.nodes import UnicpSpeedup

        (model,) = UnicpSpeedup().apply(self.patcher, SPEED)
        made, count = self.sample(model, sampler, STEPS, slice(None))
        return made, [count] * len(self.captions)

    def easy(self, sampler: str, threshold: float) -> tuple[Any, list[float]]:
        """One caption after another: what is skipped depends on the video."""
        made, counts = [], []
        for i in range(len(self.captions)):
            cache, model = EasyCache(threshold, self.sampling), self.patcher.clone()
            model.add_wrapper_with_key(comfy.WrappersMP.DIFFUSION_MODEL, "easycache", cache)
            latents, count = self.sample(model, sampler, STEPS, slice(i, i + 1))
            made.append(latents)
            counts.append(count - cache.skipped / 2)
        return torch.cat(made), counts


def runs(studio: Studio, sampler: str) -> dict[str, Callable[[], tuple[Any, list[float]]]]:
    """What is made with a sampler, by name."""
    easy = {f"EasyCache {t:g}": lambda t=t: studio.easy(sampler, t) for t in THRESHOLDS}
    return {
        "all steps": lambda: studio.plain(sampler, STEPS),
        "half the steps": lambda: studio.plain(sampler, STEPS // 2),
        f"unicp {SPEED:g}x": lambda: studio.sped(sampler),
        **easy,
    }


def made(path: Path, make: Callable[[], tuple[Any, list[float]]] | None) -> tuple[Any, list[float]] | None:
    """What lies in a part, or is made now and kept there."""
    if not path.exists() and make is not None:
        PARTS.mkdir(parents=True, exist_ok=True)
        torch.save(make(), path)
    return torch.load(path) if path.exists() else None


def rows(studio: Studio, sampler: str, make: bool) -> list[dict[str, Any]]:
    """The rows of a sampler, a method each."""
    found: list[dict[str, Any]] = []
    wanted = None
    for name, run in runs(studio, sampler).items():
        part = made(PARTS / f"{sampler}-{name.replace(' ', '-')}-{len(studio.captions)}.pt", run if make else None)
        if part is None:
            continue
        frames = studio.video(part[0])
        wanted = frames if wanted is None else wanted
        if name != "all steps":
            psnr = [round(float(metrics.psnr(a, b)), 2) for a, b in zip(frames, wanted, strict=True)]
            share = mean(part[1]) / STEPS
            found.append({"sampler": sampler, "method": name, "share": round(share, 3), "psnr": psnr})
            print(f"{sampler:<10} {name:<16} {share:5.0%} {mean(psnr):6.1f} dB, worst {min(psnr):5.1f}", flush=True)
    return found


def table(found: list[dict[str, Any]]) -> list[str]:
    """Mean and worst PSNR, and the share of evaluations, in Markdown."""
    lines = ["| sampler | method | network evaluations | PSNR, mean | worst |", "|---|---|---:|---:|---:|"]
    for row in found:
        psnr = row["psnr"]
        lines.append(
            f"| {row['sampler']} | {row['method']} | {row['share']:.0%} | {mean(psnr):.1f} dB | {min(psnr):.1f} dB |"
        )
    return lines


def block(values: dict[str, Any]) -> str:
    """What the page of the docs has between its markers."""
    machine, versions = (values["provenance"][key] for key in ("machine", "versions"))
    said = (
        f"{len(values['captions'])} captions that the model never saw; {machine['processor']}, "
        f"torch {versions['torch']}, unicp {versions['unicp']}: `{values['provenance']['command']}`."
    )
    return "\n".join([BEGIN, "", *table(values["results"]), "", said, "", END])


def page(text: str, values: dict[str, Any]) -> str:
    """The page with these figures."""
    before, _, rest = text.partition(BEGIN)
    return before + block(values) + rest.partition(END)[2]


def draw(found: list[dict[str, Any]]) -> None:
    """A bar for each method and sampler."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samplers = list(dict.fromkeys(row["sampler"] for row in found))
    methods = list(dict.fromkeys(row["method"] for row in found))
    colours = dict(zip(methods, ("#b0b0b0", "#f4511e", "#5c8fd6", "#9ec1ea"), strict=False))
    figure, axes = pyplot.subplots(figsize=(7.5, 3.4), layout="constrained")
    width = 0.8 / len(methods)
    for row in found:
        x = samplers.index(row["sampler"]) + (methods.index(row["method"]) - (len(methods) - 1) / 2) * width
        axes.bar(x, mean(row["psnr"]), 0.92 * width, color=colours[row["method"]])
        axes.text(x, mean(row["psnr"]) + 0.4, f"{row['share']:.0%}", ha="center", va="bottom", fontsize=8)
    for method in methods:
        axes.bar(0, 0, color=colours[method], label=method)
    axes.set_xticks(range(len(samplers)), samplers)
    axes.set_ylabel(f"dB against all {STEPS} steps")
    axes.set_title("Mean PSNR, and the share of network evaluations above it", fontsize=10)
    axes.legend(frameon=False, ncols=len(methods), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--captions", type=int, default=6)
    parser.add_argument("--collect", action="store_true", help="write the figures of what is there, and make nothing")
    args = parser.parse_args()
    comfy.install()
    studio = Studio(scenes.prompts(args.captions, seed=1))
    found = [row for sampler in args.only for row in rows(studio, sampler, not args.collect)]
    if args.collect or tuple(args.only) == SAMPLERS:
        kept = {"captions": studio.captions, "steps": STEPS, "results": found}
        values = figures.read(common.save("comfyui", kept, "python -m benchmarks.comfyui"))
        PAGE.write_text(page(PAGE.read_text("utf-8"), values), "utf-8")
        draw(found)


if __name__ == "__main__":
    main()
