"""The JSON beside a video: everything needed to make it again, and what was done to make it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..bench.harness import Made
from ..bench.provenance import processor
from ..policies.config import Config
from .model import Model

LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


def record(
    *,
    model: Model,
    pipe: Any,
    call: Mapping[str, Any],
    seed: int,
    method: str,
    config: Config | None,
    made: Made,
    video: dict[str, Any],
    device: Any,
    dtype: Any,
    offload: str | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Plain values.

    The video is made again by ``accelerate(pipe, config_from_dict(config))`` and
    ``pipe(**call, generator=torch.Generator().manual_seed(seed))``.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "prompt": call["prompt"],
        "negative": call.get("negative_prompt"),
        "seed": seed,
        "model": {
            "name": model.name,
            "revision": model.revision,
            "pipeline": type(pipe).__name__,
            "denoisers": dict(model.denoisers()),
            "scheduler": type(pipe.scheduler).__name__,
        },
        "method": method,
        "config": None if config is None else config.to_dict(),
        "call": dict(call),
        "video": video,
        "dtype": str(dtype).removeprefix("torch."),
        "device": _device(device),
        "offload": offload,
        "compiled": compiled,
        "versions": {"unicp": __version__, **versions, "python": platform.python_version()},
        "timings": {"loop_seconds": made.loop_seconds, "total_seconds": made.total_seconds},
        "steps": made.steps,
        "report": None if made.report is None else made.report.to_dict(),
    }


def _device(device: Any) -> dict[str, Any]:
    import torch

    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is written as the string that ``float`` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def dumps(values: Mapping[str, Any]) -> str:
    """As JSON text, in UTF-8 and with a newline at its end: one line a value, and one a step."""
    return _text(_plain(values), "") + "\n"


def _text(value: Any, indent: str) -> str:
    inner = indent + " "
    if (
        isinstance(value, dict)
        and value
        and (not indent or any(isinstance(v, dict | list) and v for v in value.values()))
    ):
        lines = [f"{inner}{_text(key, '')}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
