"""Whether a method can work on a model: asked of its denoisers without their weights, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnicpError
from ..policies.config import Config
from .model import Model


def check_method(model: Model, config: Config | None) -> None:
    """Refuse what could never work, before any weights are loaded: the denoiser is built without them.

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
    """Refuse, before any weights are loaded, what ``size`` devices can never make together.

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
                # Any group will do for the question: nothing is computed.
                accelerate(denoiser, config, group=object()).restore()


def _without_weights(model: Model, component: str, class_name: str) -> Any:
    """A denoiser as it is configured; ``None`` where it cannot be built so, and loading it has the last word."""
    import diffusers
    import torch

    kind: Any = getattr(diffusers, class_name, None)
    try:
        settings = kind.load_config(model.source, subfolder=component, local_files_only=model.offline)
        with torch.device("meta"):
            return kind.from_config(settings)
    except Exception:
        return None
