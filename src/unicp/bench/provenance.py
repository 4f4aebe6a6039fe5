"""The provenance of results: machine, versions, call and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .harness import denoisers_of
from .source import code_version
from .store import plain

LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "torchmetrics")


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def environment(pipe: Any) -> dict[str, Any]:
    """The environment on which a timing depends; results are used again only in the same one."""
    import torch

    module = next(iter(denoisers_of(pipe).values()))
    first = next(module.parameters())
    device = torch.cuda.get_device_name(first.device) if first.device.type == "cuda" else processor()
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(first.dtype).removeprefix("torch."),
        "versions": {"unicp": code_version("measuring"), **versions, "python": platform.python_version()},
    }


def command() -> str:
    """The command line of this process as one types it, without the folders of this machine."""
    words = list(sys.argv) or ["python"]
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of what was run with -m
    began = [Path(words[0]).name] if module is None else ["python", "-m", module.name.removesuffix(".__main__")]
    return shlex.join([*began, *words[1:]])


def provenance(pipe: Any, about: Mapping[str, Any], methods: Mapping[str, str], began: float) -> dict[str, Any]:
    """Everything that is needed to repeat a comparison, as plain values.

    Args:
        about: of the runs: their calls, prompts, seed.
        methods: library and version of each, by its name.
        began: when, in seconds since the epoch.
    """
    denoisers = denoisers_of(pipe)
    return {
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "system": platform.system(),
        **plain(about),
        "denoisers": {name: type(module).__name__ for name, module in denoisers.items()},
        "parameters": sum(tensor.numel() for module in denoisers.values() for tensor in module.parameters()),
        "methods": dict(methods),
    }
