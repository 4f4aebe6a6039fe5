"""A request of a page, with the Python and the command line that make the same video."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnicpError, unknown
from ..policies.config import Config, config_from_dict, config_types
from ..profiles import config_of

DEFAULT_METHOD = "budget"
"""The method that a page begins with."""
MIN_SPEEDUP, MAX_SPEEDUP = 1.25, 4.0
"""The ends of the speed slider."""
TARGET = "target_speedup"
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One video to make, accelerated and not.

    Attributes:
        model: ``"demo"``, the folder of a pipeline, or a hub id.
        config: config of the accelerated video.
        options: of the pipeline's call, named and written as on the command line (``{"--steps": 30, "--size":
            "832x480"}``); those that are ``None`` are the model's own.
    """

    prompt: str
    config: Config
    model: str = "demo"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UnicpError("the prompt is empty; write what the video is to show")
        if not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise UnicpError(f"the seed must be a whole number from 0 to {MAX_SEED}, got {self.seed}")

    def command(self) -> str:
        """The command that makes both videos.

        >>> from unicp.policies.budget import BudgetConfig
        >>> print(Request(prompt="a cat", config=BudgetConfig(target_speedup=3.0)).command())
        unicp generate 'a cat' --method budget --set target_speedup=3.0 --compare
        """
        words = ["unicp", "generate", self.prompt]
        words += ["--model", self.model] if self.model != "demo" else []
        words += ["--method", self.config.method]
        for name, value in changed(self.config).items():
            text = json.dumps(value, default=lambda other: other.to_dict())
            words += ["--set", f"{name}={value if isinstance(value, str) else text}"]
        words += ["--seed", str(self.seed)] if self.seed else []
        for option, value in self.options.items():
            if value is not None:
                words += [option, str(value)]
        return shlex.join([*words, "--compare"])


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded pipeline, and how to call it.

    Attributes:
        call: arguments of the pipeline's call, without prompt and seed.
        source: the argument of ``from_pretrained``.
        dtype: its ``dtype``.
        fps: frames per second of the video.
        notes: what the user should know, in sentences.
    """

    pipe: Any
    call: dict[str, Any]
    source: str
    device: str
    dtype: Any
    fps: float
    notes: tuple[str, ...] = ()

    def python(self, request: Request) -> str:
        """A script that makes the accelerated video, bit for bit."""
        kind = type(self.pipe).__name__
        where = "unicp.demo.path()" if request.model == "demo" else json.dumps(self.source)
        dtype = "" if str(self.dtype) == "torch.float32" else f", dtype={self.dtype}"
        device = "" if self.device == "cpu" else f".to({self.device!r})"
        arguments = {"prompt": request.prompt, **self.call}
        lines = [
            "import torch",
            "import unicp",
            f"from diffusers import {kind}",
            "",
            f"pipe = {kind}.from_pretrained({where}{dtype}){device}",
            f"with unicp.accelerate(pipe, {as_python(request.config)}) as session:",
            "    video = pipe(",
            *(f"        {name}={value!r}," for name, value in arguments.items()),
            f"        generator=torch.Generator().manual_seed({request.seed}),",
            "    ).frames[0]",
            "print(session.report())",
        ]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The functions of the command line that the page needs to find and load models.

    Attributes:
        settings: reads lines such as ``moreg=true`` into values.
        prepare: loads what a request asks for, or raises :class:`~unicp.errors.UnicpError`.
    """

    settings: Callable[[Sequence[str]], dict[str, Any]]
    prepare: Callable[[Request], Prepared]


def changed(config: Config) -> dict[str, Any]:
    """The fields of a config that are not at their defaults."""
    fields = {each.name: each.default for each in dataclasses.fields(config)}
    return {name: getattr(config, name) for name, default in fields.items() if getattr(config, name) != default}


def as_python(config: Config) -> str:
    """A config as one writes it in Python.

    >>> from unicp.policies.schedule import ScheduleConfig
    >>> as_python(ScheduleConfig(interval=2))
    'unicp.ScheduleConfig(interval=2)'
    """
    values = {n: as_python(v) if isinstance(v, Config) else repr(v) for n, v in changed(config).items()}
    return f"unicp.{type(config).__name__}({', '.join(f'{name}={text}' for name, text in values.items())})"


def methods() -> list[str]:
    """The methods that the page offers, the default first: every curve of every method."""
    names = [name for kind in config_types().values() for name in kind.curves(50)]
    return sorted(names, key=lambda name: (name != DEFAULT_METHOD, name))


def configure(method: str, speed: float, steps: int, settings: Mapping[str, Any]) -> Config:
    """The config of a method at a place of the speed slider.

    A method that takes a speed gets it. The others have a main knob, and the slider goes through its values from mild
    to bold: how fast they are is what the run shows.

    Args:
        method: one of :func:`methods`, or the path of a profile that carries a config.
        speed: from :data:`MIN_SPEEDUP` to :data:`MAX_SPEEDUP`.
        steps: denoising steps of the run.
        settings: values of fields that replace those of the curve.

    Raises:
        UnicpError: an unknown method, or a value that it refuses.

    >>> configure("budget", 2.5, 50, {}).target_speedup
    2.5
    """
    if method.endswith(".safetensors"):
        base = config_of(method)
    else:
        curves = {name: curve for kind in config_types().values() for name, curve in kind.curves(steps).items()}
        if method not in curves:
            raise unknown("method", method, [*methods(), "PROFILE.safetensors"])
        points = list(curves[method].values())
        share = min(1.0, max(0.0, (speed - MIN_SPEEDUP) / (MAX_SPEEDUP - MIN_SPEEDUP)))
        base = points[round(share * (len(points) - 1))]
    targets = {name: None for name in (TARGET, "min_psnr") if hasattr(base, name)}
    if (
        getattr(base, TARGET, None) is not None or getattr(base, "min_psnr", None) is not None
    ):  # the slider's own instead
        targets[TARGET] = float(speed) if settings.get("min_psnr") is None else None  # type: ignore[assignment]
    return config_from_dict({**base.to_dict(), **targets, **settings})


def takes_speed(config: Config) -> bool:
    """Whether a method was given a speed, and not a place between mild and bold."""
    return getattr(config, TARGET, None) is not None


def read_number(name: str, text: str | None, *, low: float, whole: bool = True) -> Any:
    """The number in a field; ``None`` where it is empty.

    >>> read_number("steps", " 30 ", low=1), read_number("guidance", "4.5", low=0, whole=False)
    (30, 4.5)
    """
    text = (text or "").strip()
    if not text:
        return None
    kind = "a whole number" if whole else "a number"
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise UnicpError(f"{name} must be {kind}, got {text!r:.80}") from None
    if not low <= value < math.inf:
        raise UnicpError(f"{name} must be {kind} of at least {low:g}, got {text:.80}")
    return value
