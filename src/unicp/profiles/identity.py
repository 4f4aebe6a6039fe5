"""Identities of models and of arguments of a pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def identity(value: Any) -> Any:
    """A plain value that identifies an argument of a pipeline in every process: pictures and tensors by their bytes."""
    if isinstance(value, list | tuple):
        return [identity(each) for each in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):
        return [type(value).__name__, hashlib.sha256(value.tobytes()).hexdigest()[:16]]
    return getattr(value, "__qualname__", None) or repr(value)


def _size(module: Any, name: str, parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter before quantisation; packed ones have the shape of their bytes."""
    of_bitsandbytes, of_gguf = (getattr(parameter, key, None) for key in ("quant_state", "quant_shape"))
    shape = of_gguf if of_gguf is not None else getattr(of_bitsandbytes, "shape", None)
    if shape is None and name == "weight":
        features = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        shape = features if all(type(count) is int for count in features) else None
    return tuple(shape if shape is not None else parameter.shape)


def settings(part: Any) -> dict[str, Any]:
    """The configuration of a model or scheduler, without what diffusers keeps there for itself."""
    return without_private(dict(getattr(part, "config", {})))


def without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers keeps there for itself.

    ``_use_default_values`` among that is in another order in every process.
    """
    return {name: value for name, value in config.items() if not name.startswith("_")}


def fingerprint(denoiser: Any) -> str:
    """A digest that identifies a model without its weights, made from class, sizes of all parameters and config.

    Names that adapters and hooks add do not count, nor does the precision, quantised or not.
    """
    sizes = []
    for name, parameter in denoiser.named_parameters():
        if "lora_" not in name:
            path, _, own = name.rpartition(".")
            sizes.append((name.replace(".base_layer", ""), _size(denoiser.get_submodule(path), own, parameter)))
    config = {name: value for name, value in settings(denoiser).items() if name != "quantization_config"}
    text = json.dumps([type(denoiser).__name__, sorted(sizes), config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(modules: Mapping[str, Any]) -> str:
    """A digest of the weights of several modules: names, shapes, precision, and sums of those that are loaded."""
    import torch

    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            if not tensor.is_meta:  # offloaded weights, which accelerate keeps elsewhere, are meta tensors
                flat = tensor.detach().flatten().to(torch.float32)
                sums = (float(flat.sum(dtype=torch.float64)), float(flat.abs().sum(dtype=torch.float64)))
                digest.update(f" {sums[0]:.9g} {sums[1]:.9g}".encode())
    return digest.hexdigest()[:16]
