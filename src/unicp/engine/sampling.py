"""Tells calls of a sampling run from training, scoring and calls with key caches, which run the plain model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .arguments import leaves

TRAINING_NOTE = (
    "the denoiser was called {how}: nothing is accelerated there, and such calls run the plain model; sample under "
    "torch.no_grad(), in eval mode"
)
KEYS_NOTE = (
    "the denoiser was called with a cache of keys ({name}), which every call fills or needs: such calls are computed"
)
KEY_CACHES = ("kv_cache", "past_key_values", "past_key_value", "key_value_cache")
"""Arguments with which autoregressive denoisers, which go frame by frame, are given their caches."""


def not_sampling(denoiser: Any, call: Mapping[str, Any]) -> str:
    """Why a call is not a step of a sampling run; empty if it may be one. Nothing is read from the device."""
    if denoiser.training:
        return TRAINING_NOTE.format(how="in training mode")
    if torch.is_grad_enabled() and _wants_gradient(denoiser, call):
        return TRAINING_NOTE.format(how="with gradients enabled")
    name = next((name for name in KEY_CACHES if call.get(name) is not None), None)
    return KEYS_NOTE.format(name=name) if name is not None else ""


def _wants_gradient(denoiser: Any, call: Mapping[str, Any]) -> bool:
    inputs = any(isinstance(x, torch.Tensor) and x.requires_grad for value in call.values() for x in leaves(value))
    return inputs or any(parameter.requires_grad for parameter in denoiser.parameters())
