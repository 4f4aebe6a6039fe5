"""Which of ComfyUI's samplers can be made faster, and how. Known by the name of their function: nothing else tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import UnicpError

FORECASTS, LONGER_STEPS = "forecasts", "longer steps"
"""Steps are skipped, and the guided velocity is forecast there; or the sampler is given fewer noise levels."""

WAYS: Mapping[str, str] = {
    "sample_euler": FORECASTS,  # ddim is this one, too
    "sample_dpmpp_2m": FORECASTS,
    "sample_unipc": FORECASTS,
    "sample_unipc_bh2": LONGER_STEPS,
    "sample_lms": LONGER_STEPS,
    "sample_ipndm": LONGER_STEPS,
    "sample_ipndm_v": LONGER_STEPS,
    "sample_deis": LONGER_STEPS,
    "sample_res_multistep": LONGER_STEPS,
    "sample_gradient_estimation": LONGER_STEPS,
    "sample_heun": LONGER_STEPS,
    "sample_heunpp2": LONGER_STEPS,
    "sample_dpm_2": LONGER_STEPS,
}
"""Samplers that draw no noise. With those that were not measured, and those of several stages, a run is what one of
fewer steps is."""

ENDS: Mapping[str, tuple[int, int]] = {"sample_dpmpp_2m": (2, 3), "sample_unipc": (3, 1)}
"""How many first and last steps are computed under samplers that look back at earlier outputs: they make more of an
error at the end than a step's length says."""

MIN_COMPUTED = 10
"""Computed steps below which those samplers are given longer steps; it is about so many that were measured."""

SLACK = 1.1
"""With those samplers a tenth more steps are computed than the target leaves: it is worth more than the speed it costs
(at 20 steps and a target of 2, 11 in place of 10 are worth 4 dB and more)."""

NOISE_OPTIONS = ("s_churn", "eta")
"""Options with which samplers draw noise that draw none without."""

KNOWN = "euler, ddim, dpmpp_2m, uni_pc, uni_pc_bh2, lms, ipndm, deis, res_multistep, gradient_estimation, heun, dpm_2"
REMEDY = f"take one of {KNOWN}, or bypass the unicp node"


def way_of(sampler: Any) -> str:
    """How sampling with a sampler of ComfyUI is made faster.

    Raises:
        UnicpError: it cannot be: it draws noise, reads the branches apart, or is not known.
    """
    function = getattr(sampler, "sampler_function", None)
    full = getattr(function, "__name__", type(sampler).__name__)
    name = full.removeprefix("sample_")
    if "cfg_pp" in name:
        raise UnicpError(
            f"the sampler {name} reads the unconditional result at every step, so no step can be skipped; {REMEDY}"
        )
    if any(part in name for part in ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")):
        raise UnicpError(
            f"the sampler {name} draws noise at its steps, and would make another video of skipped ones; {REMEDY}"
        )
    if full not in WAYS:
        raise UnicpError(f"unicp does not know the sampler {name}, nor whether it draws noise at its steps; {REMEDY}")
    options = getattr(sampler, "extra_options", None) or {}
    for option in NOISE_OPTIONS:
        if options.get(option):
            raise UnicpError(
                f"the sampler {name} draws noise at its steps with {option}={options[option]:g}; set {option} to 0, or "
                "bypass the unicp node"
            )
    return WAYS[full]


def response(sampler: Any, sigmas: Sequence[float]) -> tuple[float, ...] | None:
    """How much of each evaluation's velocity is in the latents at the end, all others being as they are.

    The sampler is played on as many numbers as there are steps, all at zero, of which each gets a velocity of one at
    its own step. For Euler's method these are the differences of neighbouring noise levels.

    Args:
        sampler: of ComfyUI; it draws no noise.
        sigmas: noise levels of the run (N + 1,).

    Returns:
        One weight a step, or ``None`` where the sampler does not evaluate the model once a step, in turn, is not
        linear, or wants more of a model than to be called.
    """
    count, asked = len(sigmas) - 1, []
    scales = torch.tensor([1.0, 2.0], dtype=torch.float32).reshape(2, 1, 1, 1, 1)

    def model(x: Any, sigma: Any, **_: Any) -> Any:
        asked.append(float(sigma.reshape(-1)[0]))
        velocity = torch.zeros_like(x)
        velocity[..., min(len(asked), count) - 1] = scales[..., 0]
        return x - asked[-1] * velocity

    levels, options = torch.tensor(sigmas, dtype=torch.float32), getattr(sampler, "extra_options", None) or {}
    zero = torch.zeros(2, 1, 1, 1, count, dtype=torch.float32)
    try:
        found = sampler.sampler_function(model, zero, levels, extra_args={}, callback=None, disable=True, **options)
        once, twice = (found / scales).reshape(2, count)
    except Exception:  # whatever it misses in so small a model: it is not needed for this
        return None
    in_turn = len(asked) == count and all(abs(a - b) <= 1e-3 * b for a, b in zip(asked, sigmas, strict=False))
    linear = bool(once.isfinite().all()) and torch.allclose(once, twice, rtol=1e-3, atol=1e-6)
    return tuple(once.tolist()) if in_turn and linear else None
