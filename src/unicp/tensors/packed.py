"""Tensors in eight bits: one byte a value, and one scale for the values of each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LARGEST = 127


@dataclass(frozen=True)
class Packed:
    """A tensor of which every value is known to half a step of its token's scale.

    Attributes:
        values: int8, in the tensor's shape (..., C).
        scale: float32 (..., 1): the largest absolute value of each token, over 127.
        dtype: that of the tensor.
    """

    values: Any
    scale: Any
    dtype: Any

    @classmethod
    def of(cls, tensor: Any) -> Packed:
        """A tensor (..., C) of floating-point numbers, packed.

        >>> float(Packed.of(torch.tensor([[1.0, -0.5]])).unpacked()[0, 1])  # doctest: +ELLIPSIS
        -0.503...
        """
        scale = tensor.abs().amax(-1, keepdim=True).float() / LARGEST
        # Of a token of zeros any scale is right.
        values = (tensor / scale.where(scale > 0, 1.0).to(tensor.dtype)).round_().clamp_(-LARGEST, LARGEST)
        return cls(values.to(torch.int8), scale, tensor.dtype)

    @staticmethod
    def bytes_of(tensor: Any) -> int:
        """Bytes that a tensor takes when it is packed."""
        channels = max(tensor.shape[-1] if tensor.ndim else 1, 1)
        return int(tensor.numel() + 4 * (tensor.numel() // channels))

    @property
    def shape(self) -> Any:
        return self.values.shape

    @property
    def tensors(self) -> tuple[Any, Any]:
        """What is held."""
        return self.values, self.scale

    def unpacked(self) -> Any:
        """The tensor, in its own precision and in memory of its own."""
        return self.values.to(self.dtype) * self.scale.to(self.dtype)


def unpacked(leaf: Any) -> Any:
    """A leaf as it was before it was packed, if it was."""
    return leaf.unpacked() if isinstance(leaf, Packed) else leaf
