"""Attention maps that outlive a step: softmax(q k^T) is kept, and only its product with new values is computed.

UniCP's windows look at attention outputs and at attention maps (arXiv 2502.04393); how maps are used is our
reconstruction. A map has ``T * T`` values per head, so this is for short sequences, such as those of the temporal
attention of factorised models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .instrumented import instrumented


def attention_map(query: Any, key: Any, mask: Any = None, scale: float | None = None) -> Any:
    """softmax(q k^T * scale + mask) of queries and keys (B, H, T, d): (B, H, T, T) in their precision.

    A query for which the mask excludes every key (padding) gets zeros, as from torch's own attention.
    """
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * factor
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    made = scores.softmax(-1)
    if mask is not None:
        made = made.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
    return made.to(query.dtype)


class _WithoutQueries:
    """An attention module as its processor sees it when queries and keys do not matter: it returns zeros for them."""

    def __init__(self, attn: Any) -> None:
        self._attn = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_q(self, hidden: Any) -> Any:
        return hidden.new_zeros((*hidden.shape[:-1], self._attn.to_q.out_features))

    def to_k(self, hidden: Any) -> Any:
        return hidden.new_zeros((*hidden.shape[:-1], self._attn.to_k.out_features))


class MapAttention:
    """One attention module that can return its maps, and run on old ones.

    Args:
        attn: the module; its processor is read at every call.
        allow: takes the bytes of a map, and returns whether it may be kept.
    """

    def __init__(self, attn: Any, allow: Callable[[int], bool]) -> None:
        self.attn = attn
        self._allow = allow
        self._made: list[Any] = []
        self._used: list[Any] = []
        self._refused = False

    @property
    def works(self) -> bool:
        """Whether the module's processor and projections allow this."""
        plain = all(isinstance(getattr(self.attn, name, None), torch.nn.Linear) for name in ("to_q", "to_k", "to_v"))
        fused = getattr(self.attn, "fused_projections", False)
        return plain and not fused and instrumented(self.attn.processor, self._keep) is not None

    def compute(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Run in full. Returns the output and the maps, or ``None`` in place of maps that would be too large."""
        self._made, self._refused = [], False
        output = self._run(forward, args, kwargs, self._keep, None)
        maps, self._made = self._made, []
        return output, None if self._refused else maps

    def reuse(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], maps: Any) -> Any:
        """Run on old maps: only the values and the output projection are computed anew."""
        self._used = list(maps)
        return self._run(forward, args, kwargs, self._apply, _WithoutQueries)

    def _run(self, forward: Any, args: Any, kwargs: Any, handler: Any, view: Any) -> Any:
        own = self.attn.processor
        self.attn.processor = instrumented(own, handler, view)
        try:
            return forward(*args, **kwargs)
        finally:
            self.attn.processor = own

    def _keep(self, attend: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        q, k, v = (query, key, value) if heads_first else (t.transpose(1, 2) for t in (query, key, value))
        size = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
        if self._refused or kwargs.get("is_causal") or not self._allow(size):
            self._refused = True
            return attend(query, key, value, *args, **kwargs)
        made = attention_map(q, k, args[0] if args else kwargs.get("attn_mask"), kwargs.get("scale"))
        self._made.append(made)
        return _out(made, v, heads_first)

    def _apply(self, attend: Any, heads_first: bool, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        v = value if heads_first else value.transpose(1, 2)
        return _out(self._used.pop(0), v, heads_first)


def _out(made: Any, value: Any, heads_first: bool) -> Any:
    out = torch.matmul(made, value)  # (B, H, T, d)
    return out if heads_first else out.transpose(1, 2)
