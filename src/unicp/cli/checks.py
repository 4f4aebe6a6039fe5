"""Checks, before anything is loaded, that a method can work on a model: its denoisers are built without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnicpError
from ..policies.config import Config
from .model import Model


def check_method(model: Model, config: Config | None) -> None:
    """Refuse a method that could never work on a model, before any weights are loaded.

    Raises:
        UnicpError: no transformer in the pipeline, or one that the method cannot be used on.
    """
    denoisers = list(model.denoisers())
    if not denoisers:
        raise UnicpError(f"{model.name} is a {model.pipeline.__name__}, which has no diffusion transformer to work on")
    if config is None:
        return
    from ..hosts.diffusers.session import accelerate

    for component, class_name in denoisers:
        denoiser = _without_weights(model, component, class_name)
        if denoiser is not None:
            accelerate(denoiser, config).restore()


def check_spread(model: Model, configs: Sequence[Config | None], size: int) -> None:
    """Refuse, before any weights are loaded, a model of which ``size`` devices can never make a clip together.

    Raises:
        UnicpError: a denoiser that diffusers cannot spread over so many, or a method that needs all of it in one place.
    """
    import diffusers

    from ..hosts.diffusers import parallel
    from ..hosts.diffusers.session import accelerate

    for component, class_name in model.denoisers():
        kind = getattr(diffusers, class_name, None)
        if kind is None:
            raise UnicpError(f"diffusers has no {class_name}, and so no way to spread it over {size} devices")
        denoiser = _without_weights(model, component, class_name)
        parallel.check_spread(kind, getattr(getattr(denoiser, "config", None), "num_attention_heads", None), size)
        for config in configs:
            if denoiser is not None and config is not None:
                # Any group serves for this check: nothing is computed.
                accelerate(denoiser, config, group=object()).restore()


def _without_weights(model: Model, component: str, class_name: str) -> Any:
    """A denoiser built from its configuration; ``None`` if it cannot be built like this: then loading it will tell."""
    import diffusers
    import torch

    kind: Any = getattr(diffusers, class_name, None)
    try:
        settings = kind.load_config(model.source, subfolder=component, local_files_only=model.offline)
        with torch.device("meta"):
            return kind.from_config(settings)
    except Exception:
        return None
