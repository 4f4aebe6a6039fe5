"""A server's folder of profiles: which of them a request means, and whether its plans can be played there."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UnicpError, unknown
from ..policies.budget import BudgetConfig, PlanBook, is_leap
from ..profiles import Profile

FOLDER = "UNICP_PROFILES"
"""The folder, as in ``UNICP_PROFILES=/profiles``."""
SUFFIX = ".safetensors"
PROFILES_KEPT = 32

SOLVERS = {
    "FlowUniPCMultistepScheduler": "UniPCMultistepScheduler",
    "LTX2FlowMatchScheduler": "FlowMatchEulerDiscreteScheduler",
    "WanEulerScheduler": "FlowMatchEulerDiscreteScheduler",
}
"""Schedulers of servers, and those of diffusers that take the same steps between the same noise levels."""

log = logging.getLogger(__name__)


def named(name: object) -> Profile:
    """The profile of that name in the folder.

    Args:
        name: its file's name, with or without the suffix. Only what a listing of the folder has is ever opened.

    Raises:
        UnicpError: there is no such folder or profile, it is a path, or the file cannot be read.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(sign in name for sign in "/\\\0"):
        raise UnicpError(f"profile must be the bare name of one in the folder {FOLDER}, not a path, got {name!r:.80}")
    folder = _folder()
    if folder is None:
        raise UnicpError(f"profile={name!r:.80}: this server has no folder of profiles; start it with {FOLDER}=/folder")
    known, name = _names(folder), name.removesuffix(SUFFIX)
    if not known:
        raise UnicpError(f"profile={name!r:.80}: the folder {FOLDER} holds no profile; make one with: unicp tune")
    if name not in known:
        raise unknown("profile", name, known)
    return _read(folder, name)


def of_model(model: str) -> Profile | None:
    """The profile that is called as the model that a server runs, if the folder holds one.

    Args:
        model: its path, or its name on the hub: the last part counts.

    Raises:
        UnicpError: the folder does not exist, or the file cannot be read.

    >>> of_model("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") is None  # without a folder
    True
    """
    folder, name = _folder(), name_of(model)
    if folder is None or not name or name not in _names(folder):
        return None
    profile = _read(folder, name)
    _say(f"{folder / name}{SUFFIX}", model)
    return profile


def name_of(model: str) -> str:
    """The last part of a model's path or of its name on the hub, also where the path is one into the hub's cache.

    >>> name_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), name_of("/hub/models--a--b/snapshots/0123/")
    ('Wan2.1-T2V-1.3B-Diffusers', 'b')
    """
    parts = [part for part in model.replace("\\", "/").split("/") if part]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or [""])[-1]


def with_profile(profile: Profile, values: Mapping[str, Any]) -> BudgetConfig:
    """The config of a profile, as :func:`unicp.accelerate` takes it, with a request's values in place of its own.

    Raises:
        UnicpError: a value is out of range, or there is no such field.
    """
    config = profile.config if isinstance(profile.config, BudgetConfig) else BudgetConfig()
    given = [name for name in ("target_speedup", "min_psnr") if values.get(name) is not None]
    targets = {"target_speedup": None, "min_psnr": None} if given else {}
    return config.replace(**{**targets, **values, "profile": profile})


def plans(
    config: BudgetConfig, scheduler: Any, model: str, *, leaps: bool = False, places: Mapping[str, str] | None = None
) -> PlanBook:
    """The plans of a config's profile, checked to be of this model and solver, and such as a server can play.

    A server has the model in classes of its own. What a profile is of is told by the configuration that lies beside
    the weights: from it the model of diffusers is built without weights, and its fingerprint compared. Where there is
    none on this machine, the log says once that this was not checked.

    Args:
        config: with its profile.
        scheduler: of the run.
        model: path or name of the model that is served.
        leaps: whether the solver can take longer steps here.
        places: folders of denoisers that are not where the model is, by name.

    Raises:
        UnicpError: the profile is of another model or scheduler, holds no plan that reaches the target, or that plan
            needs what a server cannot do.
    """
    profile: Profile = config.profile
    plan = profile.book(config).choose(config).plan
    made, runs = str(profile.metadata.get("scheduler")), type(scheduler).__name__
    if made != SOLVERS.get(runs, runs):
        raise UnicpError(
            f"the profile {profile} was made with a {made:.80}, this server runs a {runs:.80}, and a plan holds for "
            f'one solver; tune with a {SOLVERS.get(runs, runs):.80}, or ask without a profile ("profile": null)'
        )
    if not leaps and (plan.places or _leaps(profile, plan, made)):
        raise UnicpError(
            f"the plan of the profile {profile} cannot be played in a server: its solver takes longer steps, and a "
            "server's takes each one: tune with leap=0 (--leap 0)"
        )
    wrong = _wrong_model(profile, model, tuple(sorted((places or {}).items())))
    if wrong:
        raise UnicpError(f"the profile {profile} does not fit the model that is served, {name_of(model):.80}: {wrong}")
    return profile.book(config)


def _leaps(profile: Profile, plan: Any, scheduler: str) -> bool:
    """Whether a plan was made for longer steps of its solver."""
    from ..engine.solver.leap import SOLVERS as LEAPING

    share = profile.config.leap if isinstance(profile.config, BudgetConfig) else BudgetConfig().leap
    one = len(profile.metadata.get("denoisers") or ()) == 1
    return one and scheduler in LEAPING and share > 0 and any(is_leap(s, plan.steps, share) for s in plan.segments)


# --- files ------------------------------------------------------------------------------------------------------------


def _folder() -> Path | None:
    """The folder that the environment names."""
    text = os.environ.get(FOLDER, "").strip()
    if text and not os.path.isdir(text):
        raise UnicpError(f"{FOLDER}={text!r:.200} is no folder; name the one that holds the profiles, or leave it out")
    return Path(text) if text else None


def _names(folder: Path) -> list[str]:
    """What the folder holds, without the suffix."""
    try:
        return sorted(name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX))
    except OSError as error:
        raise UnicpError(f"{FOLDER}={str(folder)!r:.200} cannot be read: {error.strerror}") from error


def _read(folder: Path, name: str) -> Profile:
    path = folder / f"{name}{SUFFIX}"
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise UnicpError(f"the profile {path} cannot be read: {error.strerror}") from error
    return _loaded(path, changed)


@functools.lru_cache(maxsize=PROFILES_KEPT)
def _loaded(path: Path, changed: int) -> Profile:
    """A profile as it was written at a time; read once in a process."""
    return Profile.load(path)


@functools.lru_cache(maxsize=PROFILES_KEPT)
def _say(path: str, model: str) -> None:
    """Once in a process, for each."""
    log.info("unicp: requests to %s that name no profile are given the one that is called as it: %s", model, path)


# --- models -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=PROFILES_KEPT)
def _wrong_model(profile: Profile, model: str, places: tuple[tuple[str, str], ...]) -> str:
    """Why a profile is not of the model that is served; empty where it is, or where that cannot be told."""
    known = dict(places)
    for name in profile.metadata.get("denoisers") or {}:
        part = profile.of(name)
        served = _without_weights(part.metadata["class"], known.get(name, model), None if name in known else name)
        if served is None:
            log.warning(
                "unicp: that the profile %s is of the model %s was not checked: its configuration is not on this "
                "machine, or not one of diffusers",
                *(profile, model),
            )
            return ""
        try:
            part.check_model(served)
        except UnicpError as error:
            return str(error)
    return ""


def _without_weights(kind: str, place: str, subfolder: str | None) -> Any:
    """The denoiser of diffusers that a served model was saved from, on no device, or ``None``. Nothing is fetched."""
    import diffusers
    import torch

    try:
        config = dict(getattr(diffusers, kind).load_config(place, subfolder=subfolder, local_files_only=True))
        config.pop("quantization_config", None)  # it would ask for the library that quantised the weights
        with torch.device("meta"):
            return getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception:  # there is none, or it is of another library or release: nothing to compare with
        return None
