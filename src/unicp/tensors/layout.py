"""Conversion of hidden states between the layouts of ``BlockList``: one place for the reshapes."""

from __future__ import annotations

from typing import Any

from ..errors import UnicpError


def _to_frames(x: Any, layout: str, batch: int, frames: int) -> Any:
    """Any layout to (B, F, S, C)."""
    whole = x.shape[0] * x.shape[1]
    if whole % (batch * frames):
        raise UnicpError(
            f"hidden states of shape {tuple(x.shape)} cannot be {batch} videos of {frames} token frames in the layout "
            f"{layout!r}; check `frames` and `layout` in the model's spec"
        )
    if layout == "temporal":  # (B*S, F, C)
        return x.reshape(batch, -1, frames, x.shape[-1]).transpose(1, 2)
    return x.reshape(batch, frames, -1, x.shape[-1])  # (B, F*S, C) or (B*F, S, C)


def relayout(x: Any, source: str, target: str, batch: int, frames: int) -> Any:
    """The same hidden states in another layout; ``x`` itself where nothing changes."""
    if source == target:
        return x
    y = _to_frames(x, source, batch, frames)  # (B, F, S, C)
    if target == "temporal":
        return y.transpose(1, 2).reshape(-1, frames, x.shape[-1])
    if target == "spatial":
        return y.reshape(batch * frames, -1, x.shape[-1])
    return y.reshape(batch, -1, x.shape[-1])


def by_frame(x: Any, layout: str, batch: int, frames: int) -> Any:
    """(B, F, S, C) of hidden states in any layout."""
    return _to_frames(x, layout, batch, frames)
