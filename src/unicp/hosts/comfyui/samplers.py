"""Which of ComfyUI's samplers can be made faster, and how. Known by the name of their function: nothing else tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UnicpError

FORECASTS, LONGER_STEPS = "forecasts", "longer steps"
"""Steps are skipped, and the guided velocity is forecast there; or the sampler is given fewer noise levels."""

WAYS: Mapping[str, str] = {
    "sample_euler": FORECASTS,  # ddim is this one, too
    "sample_dpmpp_2m": LONGER_STEPS,
    "sample_unipc": LONGER_STEPS,
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
"""Samplers that draw no noise. Those of several steps or stages make more of a forecast's error than a longer step of
theirs does (docs/comfyui.md has the figures)."""

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
