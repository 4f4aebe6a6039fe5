"""The nodes, and the wrappers that they put on a model."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import torch

from ...errors import UnicpError
from ...policies.budget import BudgetConfig, PlanBook
from ...profiles import Profile
from .sampling import KEY, Report, Sampling, in_force

MAX_SPEEDUP = 6.0
REPORTS_KEPT = 16
NOTHING = "unicp: no sampling run of this model has ended yet; connect the sampler's latent to this node"
PLAIN = "unicp: target_speedup is 1, so the model runs as it is"


class Speedup:
    """The wrapper of sampling runs. Later nodes clone the model and share it: nothing of a run is in it but reports.

    Args:
        config: what is asked for.
        book: the plans of a profile, or ``None``.
    """

    def __init__(self, config: BudgetConfig, book: PlanBook | None = None) -> None:
        self._config, self._book = config, book
        self._reports: deque[Report] = deque(maxlen=REPORTS_KEPT)
        self._shown = 0

    def outer_sample(
        self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """``OUTER_SAMPLE``: a run begins, and ends."""
        guider = executor.class_obj
        options = guider.model_options.setdefault("transformer_options", {})
        levels = [float(sigma) for sigma in sigmas.tolist()]  # once, and never again
        run = Sampling(self._config, sampler, levels, self._book)
        options[KEY] = run
        # UniPC writes into the tensor that it is given.
        fewer = run.sigmas != levels
        sigmas = torch.tensor(run.sigmas, dtype=sigmas.dtype, device=sigmas.device) if fewer else sigmas.clone()
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        report = run.report()
        self._reports.append(report)
        self._shown = min(self._shown + 1, REPORTS_KEPT)
        logging.info("%s", report)
        return result

    def fresh(self) -> list[Report]:
        """Reports of the runs that ended since this was asked before, or of the last one."""
        count, self._shown = max(self._shown, 1), 0
        return list(self._reports)[-count:]


def predict_noise(executor: Any, x: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
    """``PREDICT_NOISE``: one evaluation of the model, after guidance."""
    options = args[0] if args else kwargs.get("model_options") or {}
    run = options.get("transformer_options", {}).get(KEY)
    if run is None:
        return executor(x, timestep, *args, **kwargs)
    conds = getattr(executor.class_obj, "conds", None)
    return run.predict(
        lambda: executor(x, timestep, *args, **kwargs), x, timestep, lambda sigma: in_force(conds, sigma)
    )


def plans_of(profile: Profile, config: BudgetConfig) -> PlanBook:
    """The plans of a profile, for a sampler that takes every step.

    They are bound by noise level. That they are of this model cannot be told: ComfyUI names weights otherwise.

    Raises:
        UnicpError: it holds no plans, none that is fast enough, or was made with another kind of scheduler.
    """
    scheduler = profile.metadata.get("scheduler")
    if not isinstance(scheduler, str) or "Euler" not in scheduler or "Ancestral" in scheduler:
        raise UnicpError(
            f"the profile {profile} was made with a {scheduler!s:.80}, and its plans hold for that one's solver; in "
            "ComfyUI a profile needs an Euler scheduler: tune with FlowMatchEulerDiscreteScheduler, or leave it out"
        )
    return profile.book(config)


class UnicpSpeedup:
    """A model in, the same model in fewer evaluations out."""

    CATEGORY = "unicp"
    DESCRIPTION = "Makes sampling with this model faster: says how much, and unicp decides which steps are computed."
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        speed = {"default": 2.0, "min": 1.0, "max": MAX_SPEEDUP, "step": 0.1, "tooltip": "by evaluations of the model"}
        path = {"default": "", "tooltip": "a profile of unicp tune, made with an Euler scheduler; none is needed"}
        return {
            "required": {"model": ("MODEL",), "target_speedup": ("FLOAT", speed)},
            "optional": {"profile": ("STRING", path)},
        }

    def apply(self, model: Any, target_speedup: float = 2.0, profile: str = "") -> tuple[Any]:
        """A clone of the model with our wrappers on it, and none from before.

        Raises:
            UnicpError: the speed is out of range, or the profile cannot be used.
        """
        from comfy.patcher_extension import WrappersMP

        if not 1 <= target_speedup <= MAX_SPEEDUP:
            raise UnicpError(f"target_speedup must be 1 to {MAX_SPEEDUP:g}, got {target_speedup:g}")
        config = BudgetConfig(target_speedup=target_speedup)
        wrapper = Speedup(config, plans_of(Profile.load(profile.strip()), config) if profile.strip() else None)
        model = model.clone()
        for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.PREDICT_NOISE):
            model.remove_wrappers_with_key(kind, KEY)  # applied twice, the last one counts
        if target_speedup > 1:
            model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper.outer_sample)
            model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, predict_noise)
        return (model,)


class UnicpReport:
    """What was computed in the sampling runs of a model."""

    CATEGORY = "unicp"
    DESCRIPTION = "Shows what was computed. Put it behind the sampler, with the model that the sampler was given."
    FUNCTION = "show"
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"latent": ("LATENT",), "model": ("MODEL",)}}

    def show(self, latent: Any, model: Any) -> dict[str, Any]:
        """The latents as they came, and a text."""
        from comfy.patcher_extension import WrappersMP

        found = [getattr(w, "__self__", None) for w in model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)]
        speedup = next((wrapper for wrapper in found if isinstance(wrapper, Speedup)), None)
        text = PLAIN if speedup is None else "\n\n".join(map(str, speedup.fresh())) or NOTHING
        return {"ui": {"text": [text]}, "result": (latent, text)}


NODE_CLASS_MAPPINGS = {"UnicpSpeedup": UnicpSpeedup, "UnicpReport": UnicpReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "UnicpSpeedup": "unicp: speed or quality",
    "UnicpReport": "unicp: what was computed",
}
