"""Turns the words of the command line into values; nothing here loads a model."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..batch.prompts import parse_size
from ..errors import UnicpError, unknown
from ..policies.config import Config, config_from_dict, config_types
from ..profiles import config_of

NONE = "none"
"""Name for no method: the pipeline as it is."""
TARGETS = ("target_speedup", "min_psnr")
"""Targets of a budget, which has exactly one of them."""
DTYPES = ("float32", "bfloat16", "float16")
OFFLOADS = ("model", "group", "sequential")
"""Ways to keep weights in the host's memory while they are not needed, fastest first."""

# What the help of several verbs says.
SET_HELP = "A field of the method's config, as in target_speedup=3; may be repeated."
FPS_HELP = "8 for the demo model, else 16 or the pipeline's own."
SCALE_HELP = "Show each pixel as N x N. By default small mp4 and gif are enlarged to 288 pixels or more."
OFFLOAD_HELP = f"{', '.join(OFFLOADS)}: keep weights in the host's memory until they are needed."
COMPILE_HELP = "Compile the denoiser's blocks with torch.compile; the first steps take long."
DTYPE_HELP = f"{', '.join(DTYPES)}; by default bfloat16 on a GPU, else float32."


def method_names() -> list[str]:
    """Names that ``--method`` takes, besides the path of a profile."""
    return [NONE, *sorted(config_types())]


METHOD_HELP = f"{', '.join(method_names())}, or the path of a profile."


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one per line; empty lines are left out."""
    found = [prompt.strip() for prompt in prompts]
    if file is not None:
        try:
            found += [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UnicpError(
                f"--prompts-file {file} is not UTF-8 text; give a text file with one prompt a line"
            ) from None
        except OSError as error:
            raise UnicpError(f"cannot read --prompts-file {file}: {error.strerror}") from None
    if not found:
        raise UnicpError("nothing to generate; give a prompt, such as 'a red ball bouncing fast', or --prompts-file")
    if "" in found:
        raise UnicpError("a prompt is empty; give words, such as 'a red ball bouncing fast'")
    return found


@contextmanager
def resumable(kept: Path) -> Iterator[None]:
    """Say, if the block is interrupted, that the same command goes on from what is in ``kept``."""
    try:
        yield
    except KeyboardInterrupt:
        if kept.exists():
            print(f"what was measured is saved in {kept}; the same command resumes from there", file=sys.stderr)
        raise


def read_size(text: str) -> tuple[int, int]:
    """Width and height.

    >>> read_size("832x480")
    (832, 480)
    """
    try:
        return parse_size(text)
    except ValueError as error:
        raise UnicpError(f"--size {error}") from None


def of_call(
    *, steps: int | None, guidance: float | None, size: str | None, frames: int | None, negative: str | None
) -> dict[str, Any]:
    """Values for the pipeline's call by option; ``None`` where an option was not given (:func:`.calls.build`)."""
    return {
        "--steps": steps,
        "--guidance": guidance,
        "--size": read_size(size) if size is not None else None,
        "--frames": frames,
        "--negative": negative,
    }


def read_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``--set name=value``; a value is JSON or Python notation, or else a word.

    >>> read_settings(["interval=2", "codebook=((0.1, 3), (1.0, 1))", "moreg=true", "fill=forecast"])
    {'interval': 2, 'codebook': ((0.1, 3), (1.0, 1)), 'moreg': True, 'fill': 'forecast'}
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UnicpError(f"--set takes name=value, as in --set target_speedup=3, got {setting!r}")
        values[name] = _value(text.strip())
    return values


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def read_method(method: str, settings: Sequence[str]) -> Config | None:
    """The config that ``--method`` and ``--set`` ask for; ``None`` for ``none``.

    Raises:
        UnicpError: an unknown method, a profile that cannot be read, or a value the config refuses.
    """
    values = read_settings(settings)
    if method == NONE:
        if values:
            raise UnicpError(f"--set {settings[0]} has no effect with --method none; name a method")
        return None
    kinds = config_types()
    if method in kinds:
        base: dict[str, Any] = {"method": method}
    elif method.endswith(".safetensors") or Path(method).exists():
        base = config_of(method).to_dict()
        if any(values.get(target) is not None for target in TARGETS):  # it replaces the profile's own target
            base = {name: value for name, value in base.items() if name not in TARGETS}
    else:
        raise unknown("method", method, [*method_names(), "PROFILE.safetensors"])
    if "method" in values:
        raise UnicpError("--set method=... is not possible; use --method")
    try:
        return config_from_dict({**base, **values})
    except UnicpError as error:
        hint = "" if values else "; on the command line fields are set with --set, as in --set interval=2"
        raise UnicpError(f"--method {method}: {error}{hint}") from error
    except (TypeError, ValueError) as error:
        raise UnicpError(f"--method {method} --set {' --set '.join(settings)}: {error}") from error


def read_device(name: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Device and dtype for torch; by default cuda before mps before cpu, and bfloat16 on a GPU, float32 on the CPU."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    names = [kind for kind, there in available.items() if there]
    chosen = name or names[0]
    try:
        device = torch.device(chosen)
    except RuntimeError:
        raise unknown("device", chosen, names) from None
    if device.type not in names or (device.index or 0) >= (torch.cuda.device_count() if device.type == "cuda" else 1):
        raise UnicpError(f"--device {chosen} is not available here; available: {', '.join(names)}")
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    return device, getattr(torch, dtype or ("float32" if device.type == "cpu" else "bfloat16"))


def check_offload(offload: str | None) -> None:
    """Refuse an unknown way to offload.

    Raises:
        UnicpError: it is none of :data:`OFFLOADS`.
    """
    if offload is not None and offload not in OFFLOADS:
        raise unknown("--offload", offload, OFFLOADS)
