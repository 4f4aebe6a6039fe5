"""The caches that diffusers ships, each used as its documentation says."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable
from typing import Any, ClassVar

from ..errors import UnicpError
from .observe import block_lists
from .peers import Call, Peer, Run, register


def _config(name: str) -> Any:
    import diffusers
    import diffusers.hooks

    found = getattr(diffusers.hooks, name, None)
    if found is None:
        raise UnicpError(f"diffusers {diffusers.__version__} has no {name}; a later release does")
    return found


class _Hooked(Peer):
    """A cache that ``transformer.enable_cache`` puts on every denoiser."""

    source = "diffusers"
    fields: ClassVar[str] = ""

    def config(self, run: Run, denoiser: Any, value: Any) -> Any:
        return _config(self.fields)(**{self.knob: value})

    def apply(self, run: Run, label: str) -> Call:
        for denoiser in run.denoisers:
            enable = getattr(denoiser, "enable_cache", None)
            if enable is None:
                raise UnicpError(f"{type(denoiser).__name__} has no enable_cache: diffusers caches do not apply to it")
            enable(self.config(run, denoiser, self.value(label)))
        return run.call

    def remove(self, run: Run) -> None:
        for denoiser in run.denoisers:
            if getattr(denoiser, "is_cache_enabled", False):
                denoiser.disable_cache()


@register
class FirstBlockCache(_Hooked):
    """Skips the other blocks while the first one's residual changes little."""

    name = "first-block-cache"
    fields = "FirstBlockCacheConfig"
    knob = "threshold"
    grid = (0.05, 0.1, 0.2, 0.3)


@register
class MagCache(_Hooked):
    """Skips while the expected change of the residual's magnitude, calibrated beforehand, stays within a budget."""

    name = "magcache"
    fields = "MagCacheConfig"
    knob = "threshold"
    grid = (0.03, 0.06, 0.12, 0.24)
    calibrates = True
    note = "Calibrated beforehand on one prompt of the comparison, with the mean of the branches' ratios."

    def calibrate(self, run: Run, generate: Callable[[Any, Call], Any]) -> list[float]:
        """The magnitude ratios, one per step, as diffusers' calibration mode prints them."""
        for denoiser in run.denoisers:
            denoiser.enable_cache(_config(self.fields)(calibrate=True, num_inference_steps=run.steps))
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # printing is the only way it gives them
            generate(run.pipe, run.call)
        found = [
            ast.literal_eval(line) for line in said.getvalue().splitlines() if re.fullmatch(r"\[[^\]a-zA-Z]*\]", line)
        ]
        if not found or len({len(ratios) for ratios in found}) != 1:
            raise UnicpError("MagCache's calibration gave no ratios: its hooks never saw a whole run of this pipeline")
        return [sum(ratios) / len(found) for ratios in zip(*found, strict=True)]

    def config(self, run: Run, denoiser: Any, value: Any) -> Any:
        return _config(self.fields)(threshold=value, num_inference_steps=run.steps, mag_ratios=run.calibrated)


@register
class TaylorSeer(_Hooked):
    """Computes every k-th step; extrapolates every attention and feed-forward output in the step index."""

    name = "taylorseer"
    fields = "TaylorSeerCacheConfig"
    knob = "cache_interval"
    grid = (2, 3, 4, 5)
    note = "Its default patterns match no module of most models; these are made from the model's own module names."

    def config(self, run: Run, denoiser: Any, value: Any) -> Any:
        return _config(self.fields)(
            cache_interval=value,
            cache_identifiers=patterns(denoiser),
            taylor_factors_dtype=next(denoiser.parameters()).dtype,
        )


def patterns(denoiser: Any) -> list[str]:
    """Regular expressions that match the attention and feed-forward modules of every block in full.

    Raises:
        UnicpError: there are none.
    """
    found = set()
    for name, blocks in block_lists(denoiser).items():
        for block in blocks:
            for child, _ in block.named_children():
                if re.match(r"attn|ff|mlp", child) and "norm" not in child:
                    found.add(rf"{re.escape(name)}\.\d+\.{re.escape(child)}")
    if not found:
        raise UnicpError(f"no attention or feed-forward modules found in the blocks of {type(denoiser).__name__}")
    return sorted(found)


@register
class SeaCache(_Hooked):
    """Skips while the spectrally filtered input changes little; extrapolates the residual."""

    name = "seacache"
    fields = "SeaCacheConfig"
    knob = "threshold"
    grid = (0.05, 0.1, 0.25, 0.5, 1.0)


class _Ranged(_Hooked):
    """A cache whose knob is a range of steps, with a name too long for a label."""

    def labels(self, steps: int) -> tuple[str, ...]:
        return tuple(f"range={value}" for value in self.values)

    def value(self, label: str) -> Any:
        return int(label.partition("=")[2])


@register
class PyramidAttentionBroadcast(_Ranged):
    """Reuses attention outputs in fixed ranges."""

    name = "pab"
    fields = "PyramidAttentionBroadcastConfig"
    knob = "spatial_attention_block_skip_range"
    grid = (2, 3, 4)
    note = (
        "Counts calls, not steps: on pipelines that call the denoiser once for each guidance branch it hands one "
        "branch's attention to the other."
    )

    def config(self, run: Run, denoiser: Any, value: Any) -> Any:
        pipe = run.pipe
        return _config(self.fields)(
            spatial_attention_block_skip_range=value,
            temporal_attention_block_skip_range=value + 1,
            cross_attention_block_skip_range=value + 2,
            current_timestep_callback=lambda: pipe.current_timestep,
        )


@register
class FasterCache(_Ranged):
    """Blends attention outputs and approximates the unconditional branch."""

    name = "fastercache"
    fields = "FasterCacheConfig"
    knob = "unconditional_batch_skip_range"
    grid = (2, 3, 5)
    note = "Made for pipelines that put both guidance branches into one batch."

    def config(self, run: Run, denoiser: Any, value: Any) -> Any:
        pipe = run.pipe
        return _config(self.fields)(
            unconditional_batch_skip_range=value,
            current_timestep_callback=lambda: pipe.current_timestep,
            attention_weight_callback=lambda _: 0.3,  # the value of the documentation's example
            tensor_format="BFCHW" if "CogVideoX" in type(denoiser).__name__ else "BCFHW",
        )
