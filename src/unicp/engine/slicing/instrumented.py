"""Copies of attention processors whose call of the attention kernel is redirected."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

AttentionHandler = Callable[..., Any]
"""``handler(attend, heads_first, query, key, value, *args, **kwargs)`` replaces an attention call.

``attend`` is the call it replaces; query, key and value are (B, H, T, d) if ``heads_first``, else (B, T, H, d).
"""

DISPATCH = "dispatch_attention_fn"
SDPA = "scaled_dot_product_attention"


class _Functional:
    """``torch.nn.functional`` with one function replaced."""

    def __init__(self, attention: Callable[..., Any]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def instrumented(processor: Any, handler: AttentionHandler, view: Callable[[Any], Any] | None = None) -> Any:
    """A copy of an attention processor whose call of the attention kernel goes through ``handler``.

    The processor's own code runs, with its own projections, norms and rotary embedding: only the name by which it
    calls the kernel (diffusers' ``dispatch_attention_fn`` or torch's ``scaled_dot_product_attention``) refers to
    ``handler`` in the copy. No class and no module is changed.

    Args:
        processor: an attention processor of diffusers, or one written like them.
        handler: see :data:`AttentionHandler`.
        view: makes, from the attention module, what the processor sees instead of it.

    Returns:
        The copy, or ``None`` where the processor calls neither function by a global name.
    """
    original = type(processor).__call__ if callable(processor) else None
    code = getattr(original, "__code__", None)
    if original is None or code is None:
        return None
    replaced: dict[str, Any] = {}
    for name in code.co_names:
        known = original.__globals__.get(name)
        if name == DISPATCH and callable(known):
            replaced[name] = functools.partial(handler, known, False)
        elif known is F and SDPA in code.co_names:
            replaced[name] = _Functional(functools.partial(handler, F.scaled_dot_product_attention, True))
        elif name == SDPA and known is F.scaled_dot_product_attention:
            replaced[name] = functools.partial(handler, known, True)
    if not replaced:
        return None
    function = types.FunctionType(
        code, {**original.__globals__, **replaced}, original.__name__, original.__defaults__, original.__closure__
    )
    function.__kwdefaults__ = original.__kwdefaults__

    # diffusers looks at the signature of a processor's call to decide what to pass: `wraps` preserves it.
    @functools.wraps(original)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, view(attn) if view else attn, *args, **kwargs)

    twin = copy.copy(processor)
    twin.__class__ = type(type(processor).__name__, (type(processor),), {"__call__": call})
    return twin
