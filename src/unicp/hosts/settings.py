"""What to do, as people say it to a server: in a request, in its settings, or by the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ..errors import UnicpError
from ..policies.config import Config, config_from_dict, make_policy

TARGET_SPEEDUP = "UNICP_TARGET_SPEEDUP"
"""A number, as in ``UNICP_TARGET_SPEEDUP=2``."""
CONFIG = "UNICP_CONFIG"
"""A config in JSON, as in ``UNICP_CONFIG='{"method": "schedule", "interval": 2}'``."""


def config_of(given: Any) -> Config | None:
    """The config that a setting means.

    Args:
        given: a number is the speed-up of a budget; a mapping is a config, of a budget where it names no method; a
            config is one; ``None`` and ``False`` are none.

    Raises:
        UnicpError: it is none of these, or one that a server cannot play: it looks into blocks, or names a profile.

    >>> config_of(2).target_speedup, config_of({"target_speedup": 3}).target_speedup, config_of(False)
    (2, 3, None)
    """
    if given is None or given is False:
        return None
    if isinstance(given, Config):
        config = given
    elif isinstance(given, Mapping):
        config = config_from_dict({"method": "budget", **given})
    elif isinstance(given, int | float) and not isinstance(given, bool):
        config = config_from_dict({"method": "budget", "target_speedup": given})
    else:
        raise UnicpError(f"unicp takes a speed-up, as in 2, or a config in a mapping, got {given!r:.80}")
    if getattr(config, "profile", None) is not None:
        raise UnicpError("a profile belongs to a model of diffusers, and cannot be played here; give target_speedup")
    if make_policy(config).needs().inside:
        raise UnicpError(f"{config.method} looks into the blocks of a diffusers model; use budget or schedule here")
    return config


def from_environment() -> Config | None:
    """The config that the environment names, if any.

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
        return config_of(value)
    except UnicpError as error:
        raise UnicpError(f"{name}: {error}") from None
