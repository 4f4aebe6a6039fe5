"""A model in a local folder, by its configuration files alone: what ``unicp rehearse --model PATH`` builds."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UnicpError, first_line
from .pretend import DEVICE, Unfilled
from .published import MODELS, Published, half_precision, of_diffusers

INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER = "scheduler/scheduler_config.json"


def local(path: str) -> Published:
    """The model of a folder, to be called as the published one of its class is.

    Its transformers, scheduler and VAE are configured as the files say, and so is the pipeline; what has no file is as
    in the published model. No weights are looked at.

    Args:
        path: a folder of a diffusers pipeline, a folder of a transformer, or the ``config.json`` of one.

    Raises:
        UnicpError: there is no such model there, or none that is called as one of :data:`MODELS` is.
    """
    where = Path(path).expanduser()
    if not where.exists():
        raise UnicpError(
            f"there is no folder {path} (nothing is fetched from the hub); give one, or one of: {', '.join(MODELS)}"
        )
    root = where if where.is_dir() else where.parent
    index = _read(root / INDEX) if where.is_dir() and (root / INDEX).is_file() else {}
    if where.is_file():
        configs = [_read(where)]
    elif index or (root / "transformer" / CONFIG).is_file():
        names = ["transformer", "transformer_2"]
        has = [name for name in names if (root / name / CONFIG).is_file() or any(index.get(name) or ())]
        configs = [_read(root / name / CONFIG) for name in has]
    else:
        configs = [_read(root / CONFIG)] if (root / CONFIG).is_file() else []
    if not configs:
        raise UnicpError(
            f"{path} has no transformer/{CONFIG}, and is no folder of a transformer, which has a {CONFIG}; give the "
            "folder of a diffusers pipeline or of its transformer"
        )
    called = _called_as(path, configs, index)
    kind = called.found(called.kind)
    given = [kind.extract_init_dict(dict(config))[0] for config in configs]
    if any(config != given[0] for config in given):
        raise UnicpError(f"transformer and transformer_2 of {path} differ; only two of one configuration are rehearsed")
    if _conditioned(kind, given[0]) != _conditioned(kind, called.config):
        raise UnicpError(
            f"the transformer of {path} takes in_channels={given[0]['in_channels']}: latents and more, as for images; "
            f"only calls of {called.pipeline} are rehearsed, which have none"
        )
    more: dict[str, Any] = {}
    taken = inspect.signature(called.found(called.pipeline).__init__).parameters
    more |= {name: value for name, value in index.items() if name in taken and not isinstance(value, list)}
    if index and (root / SCHEDULER).is_file():
        more["scheduler"] = _made(root / SCHEDULER, path)
    if index and (root / "vae" / CONFIG).is_file():
        more["vae"] = _made(root / "vae" / CONFIG, path)
    return replace(
        called,
        name=path,
        source=str(root),
        config=given[0],
        parts=lambda transformer: {**called.parts(transformer), **more},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UnicpError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UnicpError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("_class_name"), str):
        raise UnicpError(f"{path} names no class (_class_name); is it of a diffusers pipeline?")
    return values


def _called_as(path: str, configs: list[dict[str, Any]], index: Mapping[str, Any]) -> Published:
    """The published model whose pipeline and transformers these are."""
    kind, pipeline = configs[0]["_class_name"], index.get("_class_name")
    alike = [
        model
        for model in MODELS.values()
        if model.kind.rpartition(":")[2] == kind and pipeline in (None, model.pipeline.rpartition(":")[2])
    ]
    if not alike:
        has = f"a {kind}" if pipeline is None else f"a {kind} in a {pipeline}"
        known = sorted({f"{m.kind.rpartition(':')[2]} in {m.pipeline.rpartition(':')[2]}" for m in MODELS.values()})
        raise UnicpError(f"{path} is {has}, which cannot be rehearsed; what can: {', '.join(known)}")
    found = [model for model in alike if model.denoisers == len(configs)]
    if not found:
        raise UnicpError(f"{path} has {len(configs)} transformers; {alike[0].pipeline} is rehearsed with 1")
    return found[0]


def _conditioned(kind: Any, config: Mapping[str, Any]) -> int:
    """How many more channels go into a transformer than come out."""
    defaults = inspect.signature(kind.__init__).parameters

    def value(name: str) -> int | None:
        return config[name] if name in config else getattr(defaults.get(name), "default", None)

    taken, made = value("in_channels"), value("out_channels")
    return taken - made if isinstance(taken, int) and isinstance(made, int) else 0


def _made(path: Path, asked: str) -> Any:
    """A scheduler, or a VAE without weights, by its configuration file."""
    config = _read(path)
    kind = of_diffusers(config["_class_name"], asked)
    try:
        if "scheduler" in path.parts[-2]:
            return kind.from_config(config)
        with Unfilled():
            return half_precision(kind, kind.extract_init_dict(config)[0], DEVICE)
    except Exception as error:
        raise UnicpError(f"{path} cannot be built: {first_line(error)}") from error
