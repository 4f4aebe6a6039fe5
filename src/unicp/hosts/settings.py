"""What to do, as people say it to a server: in a request, in its settings, or by the environment."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import UnicpError
from ..policies.budget import BudgetConfig
from ..policies.config import Config, config_from_dict, make_policy
from . import folder

TARGET_SPEEDUP = "UNICP_TARGET_SPEEDUP"
"""A number, as in ``UNICP_TARGET_SPEEDUP=2``."""
CONFIG = "UNICP_CONFIG"
"""A config in JSON, as in ``UNICP_CONFIG='{"method": "schedule", "interval": 2}'``."""


def config_of(given: Any, model: str | None = None) -> Config | None:
    """The config that a setting means.

    Args:
        given: a number is the speed-up of a budget; a mapping is a config, of a budget where it names no method; a
            config is one; ``None`` and ``False`` are none. A budget may name a profile of the folder
            (:data:`unicp.hosts.folder.FOLDER`), and then has what else it needs from there; with ``"profile": None`` it
            has none. If it says nothing of profiles, it is given the one that is called as the model, if there is one.
        model: path or name of the model that is served; ``None`` if that is not known yet.

    Raises:
        UnicpError: it is none of these, or one that a server cannot play: it looks into blocks, or its profile cannot
            be had.

    >>> config_of(2).target_speedup, config_of({"target_speedup": 3}).target_speedup, config_of(False)
    (2, 3, None)
    """
    if given is None or given is False:
        return None
    if isinstance(given, Config):
        values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        config, open_ = given, values.get("profile") is None
    elif isinstance(given, Mapping):
        values = {name: value for name, value in given.items() if name != "method"}
        config, open_ = config_from_dict({"method": "budget", **given}), "profile" not in given
    elif isinstance(given, int | float) and not isinstance(given, bool):
        values = {"target_speedup": given}
        config, open_ = config_from_dict({"method": "budget", **values}), True
    else:
        raise UnicpError(f"unicp takes a speed-up, as in 2, or a config in a mapping, got {given!r:.80}")
    if isinstance(config, BudgetConfig):
        return _budget(config, values, model, open_)
    if make_policy(config).needs().inside:
        raise UnicpError(f"{config.method} looks into the blocks of a diffusers model; use budget or schedule here")
    return config


def _budget(config: BudgetConfig, values: Mapping[str, Any], model: str | None, open_: bool) -> BudgetConfig:
    """A budget with its profile.

    Args:
        config: what was asked for.
        values: its fields that were given.
        model: as for :func:`config_of`.
        open_: whether it leaves the profile to the server.
    """
    profile = config.profile
    if isinstance(profile, str):
        profile = folder.named(profile)
    elif open_ and model is not None:
        profile = folder.of_model(model)
    if profile is not None:
        return folder.with_profile(profile, values)
    if config.min_psnr is not None and model is not None:
        name = folder.name_of(model) or "MODEL"
        raise UnicpError(
            f"min_psnr={config.min_psnr:g} needs a profile: name one of the folder {folder.FOLDER}, or put one there "
            f"that is called {name}{folder.SUFFIX} (unicp tune makes one); target_speedup works without"
        )
    return config


def from_environment(model: str | None = None) -> Config | None:
    """The config that the environment names, if any.

    Args:
        model: as for :func:`config_of`.

    Raises:
        UnicpError: it cannot be read, or both variables are set.
    """
    speedup, config = os.environ.get(TARGET_SPEEDUP, "").strip(), os.environ.get(CONFIG, "").strip()
    if speedup and config:
        raise UnicpError(f"set {TARGET_SPEEDUP} or {CONFIG}, not both")
    name, text = (TARGET_SPEEDUP, speedup) if speedup else (CONFIG, config)
    if not text:
        return None
    try:
        value = float(text) if speedup else json.loads(text)
    except ValueError:
        raise UnicpError(f"{name}={text!r:.80} cannot be read: it takes {'a number' if speedup else 'JSON'}") from None
    try:
        return config_of(value, model)
    except UnicpError as error:
        raise UnicpError(f"{name}: {error}") from None
