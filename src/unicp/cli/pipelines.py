"""Finds and loads a pipeline: the demo model, a folder, or a model of the hub."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import demo
from ..errors import UnicpError, UnicpWarning
from .model import Model
from .screen import waiting

DEMO = "demo"
INDEX = "model_index.json"
KINDS = f"--model takes {DEMO}, a folder, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FLOAT32_DECODERS = {"AutoencoderKLWan"}
"""Decoders that stay in float32 whatever the dtype, as their makers load them."""


def find(name: str) -> Model:
    """The pipeline that ``--model`` names.

    Raises:
        UnicpError: there is none, or the hub cannot be reached.
    """
    if name == DEMO:
        folder = demo.path()
        if not (folder / INDEX).is_file():
            raise UnicpError(
                "the demo model is missing from this installation; reinstall unicp, or run: make train-demo"
            )
    else:
        folder = Path(name).expanduser()
        if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            return _find_on_hub(name)
        if not folder.exists():
            raise UnicpError(f"there is no model folder {name}; {KINDS}")
        if not (folder / INDEX).is_file():
            raise UnicpError(f"{name} is no diffusers pipeline: it has no {INDEX}; {KINDS}")
    return Model(name=name, source=str(folder), index=_read_index(folder / INDEX, name))


def _read_index(path: Path, name: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UnicpError(f"the {INDEX} of {name} cannot be read: {error}") from error
    if not isinstance(values, dict) or "_class_name" not in values:
        raise UnicpError(f"the {INDEX} of {name} names no pipeline class; is it a diffusers pipeline?")
    return values


def _find_on_hub(name: str) -> Model:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    offline, revision = False, None
    try:
        # One short question first: the downloads' own repeated attempts take half a minute to give up.
        revision = get_hf_file_metadata(hf_hub_url(name, INDEX), timeout=10).commit_hash
    except GatedRepoError:
        raise UnicpError(
            f"{name} asks for its terms to be accepted; do so on its hub page, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise UnicpError(
            f"there is no folder {name} and no such model on the hub (private ones need: hf auth login)"
        ) from None
    except EntryNotFoundError:
        raise UnicpError(f"{name} on the hub is no diffusers pipeline: it has no {INDEX}; {KINDS}") from None
    except Exception:  # whatever the network and its libraries may raise
        offline = True
    try:
        path = Path(hf_hub_download(name, INDEX, local_files_only=offline))
    except Exception as error:
        raise UnicpError(
            f"there is no folder {name}, and the hub cannot be reached to look for it there; check the network, or "
            f"give the path of a downloaded pipeline; --model {DEMO} needs no network"
        ) from error
    return Model(name=name, source=name, index=_read_index(path, name), revision=revision, offline=offline)


def load(model: Model, device: Any, dtype: Any, offload: str | None = None, compiled: bool = False) -> Any:
    """The pipeline on its device, silent.

    Args:
        offload: one of :data:`options.OFFLOADS`, by diffusers' own means; ``None`` keeps everything on the device.
        compiled: compile the denoisers, block by block where they name the blocks that repeat.

    Raises:
        UnicpError: it cannot be read, or cannot be offloaded so.
    """
    import diffusers
    import torch
    import transformers

    source = model.source
    if model.revision is not None and not model.offline:
        source = str(diffusers.DiffusionPipeline.download(model.source, revision=model.revision))  # has bars of its own
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    entry = model.index.get("vae")
    precise = isinstance(entry, list) and entry[-1] in FLOAT32_DECODERS
    dtypes = {"default": dtype, "vae": torch.float32} if precise and dtype != torch.float32 else dtype
    with waiting(f"loading {model.name}"):
        try:
            pipe = model.pipeline.from_pretrained(source, dtype=dtypes, local_files_only=model.offline)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UnicpError(f"{model.name} cannot be loaded: {lines[0]:.200}; check or download it again") from error
        _place(pipe, device, offload)
    for name, _ in model.denoisers() if compiled else ():
        denoiser = getattr(pipe, name)
        if getattr(denoiser, "_repeated_blocks", None):
            denoiser.compile_repeated_blocks()
        else:
            denoiser.compile()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _place(pipe: Any, device: Any, offload: str | None) -> None:
    if offload is None:
        pipe.to(device)
        return
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            streams = device.type == "cuda"
            pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=streams)
    except Exception as error:  # whatever diffusers and accelerate raise where a model does not suit them
        raise UnicpError(
            f"--offload {offload}: {type(pipe).__name__} cannot be offloaded so: {error!s:.200}"
        ) from error


def warn_of_unknown_words(pipe: Any, prompts: Sequence[str]) -> None:
    """The demo model knows a few dozen words; say which of a prompt it does not."""
    words: dict[str, None] = {}
    for prompt in prompts:
        encoded = pipe.tokenizer(prompt, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if token == pipe.tokenizer.unk_token_id:
                words[prompt[start:end]] = None
    if words:
        listed = ", ".join(repr(word) for word in words)
        warnings.warn(
            f"the demo model does not know {listed}; it draws captions such as {demo.prompts(1)[0]!r}",
            UnicpWarning,
            stacklevel=2,
        )
