"""SGLang-Diffusion: a plug-in that stands around the guided prediction of its denoising stage, once a step.

SGLang finds :func:`register` by the entry-point group ``sglang.multimodal_gen.plugins``, in every worker, before its
runtime is imported: so this module imports next to nothing, either. Nothing is done unless it is asked for:
``UNICP_TARGET_SPEEDUP=2`` for a server, or ``diffusers_kwargs={"unicp": 2}`` in a request. ``UNICP_PROFILES`` names a
folder of profiles.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import UnicpError
from ..policies.config import Config
from . import folder
from .settings import config_of, from_environment

TARGET = (
    "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage._predict_noise_with_cfg"
)  # fmt: skip
"""What is called at each step: runs all branches of guidance, and returns what the scheduler is given."""

KEY = "unicp"
"""In a request: its settings, in ``diffusers_kwargs``; and while it is under way, its run, in ``extra``."""
REPORT = "unicp_report"
"""In a request's ``extra``: what was done, once it is over."""

log = logging.getLogger(__name__)


def register() -> None:
    """Called by SGLang. Imports nothing of its runtime: the target is a name until SGLang applies its hooks."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(TARGET, predict, HookType.AROUND)


def predict(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the guided prediction of a step: calls ``original``, or returns its forecast.

    Raises:
        UnicpError: the settings cannot be read, or the server runs in a way that this does not go together with.
    """
    call = inspect.signature(original).bind(stage, *args, **kwargs).arguments
    batch, server = call["batch"], call["server_args"]
    if batch.is_warmup:
        return original(stage, *args, **kwargs)
    index, latents = int(call["timestep_index"]), call["latents"]
    clip = batch.extra.get(KEY)
    if clip is None or not clip.goes_on(index, latents):
        config = _config(batch, getattr(server, "model_path", None) or "")
        if config is None:
            return original(stage, *args, **kwargs)
        _check(stage, batch, server)
        clip = batch.extra[KEY] = _Clip(config, stage, batch, server, latents)
    output = clip.step(index, call["current_model"], lambda: original(stage, *args, **kwargs))
    if clip.is_over:
        report = batch.extra.pop(KEY).run.report()
        batch.extra[REPORT] = report.to_dict()
        log.info("%s", report)
    return output


def _config(batch: Any, model: str) -> Config | None:
    """What is asked for in a request; else, of the server, which runs this model."""
    asked = batch.extra.get("diffusers_kwargs") or {}
    return config_of(asked[KEY], model) if KEY in asked else from_environment(model)


def _plans(config: Config, scheduler: Any, server: Any) -> Any:
    """The plans of a config's profile, if it has one.

    What ``tune`` saw of the forecasts' errors is left out: it saw them on one branch of guidance, and here the guided
    prediction is forecast, whose errors are others.
    """
    if getattr(config, "profile", None) is None:
        return None
    places = getattr(server, "component_paths", None)
    book = folder.plans(config, scheduler, getattr(server, "model_path", None) or "", places=places)  # type: ignore[arg-type]
    return replace(book, plans=tuple([replace(priced, expected=None) for priced in book.plans]))


def _check(stage: Any, batch: Any, server: Any) -> None:
    """Refuse what would decide apart, or not at all."""
    from ..tensors import private

    asked = getattr(batch, "enable_teacache", False), getattr(batch, "enable_spectrum", False)
    if private.spread_over(stage) > 1:
        what = "sequence parallelism spreads the latents over processes, which would decide apart: set --sp-degree 1"
    elif getattr(server, "enable_cfg_parallel", False):
        what = "guidance branches run in processes of their own, which would decide apart: drop --enable-cfg-parallel"
    elif getattr(server, "enable_breakable_cuda_graph", False):
        what = "captured CUDA graphs replay no decisions: drop --enable-breakable-cuda-graph"
    elif any(asked) or private.has_cache_dit(stage):
        what = "another cache acts on the model (TeaCache, Spectrum or cache-dit), and two do not go together: drop one"
    else:
        return
    raise UnicpError(f"unicp cannot act in this server: {what}")


class _Clip:
    """One pass of the denoising loop over the latents of a request."""

    def __init__(self, config: Config, stage: Any, batch: Any, server: Any, latents: Any) -> None:
        import torch

        from ..engine.run import Run
        from ..engine.solver.levels import noise_levels
        from ..engine.solver.response import response_and_noise

        scheduler = batch.scheduler if getattr(batch, "scheduler", None) is not None else stage.scheduler
        timesteps = batch.timesteps if getattr(batch, "timesteps", None) is not None else scheduler.timesteps
        weights, noisy = response_and_noise(scheduler)
        if noisy:
            raise UnicpError(
                f"{type(scheduler).__name__} draws noise at its steps, which no forecast can follow; choose another "
                "scheduler, or leave unicp out"
            )
        levels = [float(level) for level in torch.as_tensor(timesteps).tolist()]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) > len(levels):
            levels = noise_levels(scheduler, torch.as_tensor(sigmas)[: len(levels)].tolist())
        weights = weights if weights and len(weights) == len(levels) else None
        self.run = Run(config, levels, weights=weights, book=_plans(config, scheduler, server))
        self._count, self._shape, self._at = len(levels), self._shape_of(latents), -1
        self._two = getattr(stage, "transformer_2", None) is not None
        self._models: list[int] = []  # by the order of their turns

    @staticmethod
    def _shape_of(latents: Any) -> Any:
        return getattr(latents, "shape", None)

    @property
    def is_over(self) -> bool:
        return self._at == self._count - 1

    def goes_on(self, index: int, latents: Any) -> bool:
        """Whether a call is a later step of this pass: not of another size, nor an earlier step."""
        return index > self._at and self._shape_of(latents) == self._shape

    def step(self, index: int, model: Any, compute: Callable[[], Any]) -> Any:
        """The prediction of a step. Outputs of one expert (Wan 2.2) never stand in for those of the other."""
        if id(model) not in self._models:
            self._models.append(id(model))
        branch = f"expert {1 + self._models.index(id(model))}" if self._two else "guided"
        self._at = index
        return self.run.step(index, branch, compute)
