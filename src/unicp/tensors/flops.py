"""Counts the floating-point operations of what runs, at the shapes at which it runs.

Matrix products, convolutions and attention are counted by the formulas of ``torch.utils.flop_counter``, a
multiplication and an addition as two operations. Attention kernels that are missing there are counted by the same
formula as the others. Elementwise operations are not counted: in a video transformer they are less than a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from . import private

aten = torch.ops.aten

ATTENTION_NAMES = ("attn", "attention")
"""Parts of names by which attention kernels of other libraries are recognised."""
KERNELS_HEADS_FIRST = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
"""Fused attention of torch itself, on (B, H, T, d), without a formula in torch's registry."""
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1}
"""Matrix products, and the place of their first factor; the second one follows it."""
METADATA = ("size", "stride", "numel", "dim", "storage_offset", "is_contiguous", "layout", "device")
"""Queries of a tensor's metadata, which reach tensor subclasses as if they were operators."""
LINEAR = {aten.mm, aten.addmm, aten.linear, aten._scaled_mm, aten.convolution}
"""Operators of layers that look at one token, or one patch, at a time."""


def attention_operations(query: Any, key: Any, value: Any, heads_first: bool = True) -> int:
    """Operations of softmax(q k^T) v, given the shapes (B, H, T, d) or, with heads behind tokens, (B, T, H, d).

    >>> attention_operations((1, 2, 10, 8), (1, 2, 5, 8), (1, 2, 5, 8)) == 2 * 2 * 2 * 10 * 5 * 8
    True
    """
    shapes = [tuple(shape) for shape in (query, key, value)]
    if not heads_first:
        shapes = [(b, h, t, d) for b, t, h, d in shapes]
    (b, h, t, d), s = shapes[0], shapes[1][2]
    return 2 * b * h * t * s * (d + shapes[2][3])


def _of_kernel(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return attention_operations(query, key, value)


EXTRA: dict[Any, Callable[..., int]] = {
    getattr(aten, name): _of_kernel for name in KERNELS_HEADS_FIRST if hasattr(aten, name)
}
"""Formulas to add to those of torch, for ``FlopCounterMode(custom_mapping=EXTRA)``."""


def _shapes(values: Iterable[Any]) -> list[Any]:
    return [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in values]


_UNCOUNTED: set[Any] = set()
"""Operators that were seen to have no formula and to be made of no others: most of those that run."""


def _is_foreign_attention(func: Any) -> bool:
    name = func._schema.name.rpartition("::")[2].lower()
    return func.namespace not in ("aten", "prims", "prim") and any(part in name for part in ATTENTION_NAMES)


def _foreign_attention(func: Any, args: tuple[Any, ...]) -> int | None:
    """Operations of an attention kernel of another library, which all take (B, T, H, d); ``None`` for other kernels."""
    if not _is_foreign_attention(func) or len(args) < 3 or any(getattr(value, "ndim", 0) != 4 for value in args[:3]):
        return None
    query, key, value = _shapes(args[:3])
    return attention_operations(query, key, value, heads_first=False)


def operations(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> int | None:
    """Operations of one call of an operator; ``None`` where there is no formula, as for elementwise operators."""
    packet = func._overloadpacket
    if packet in PRODUCTS:  # torch's formulas would do, but take a hundred times longer
        first, second = args[PRODUCTS[packet] :][:2]
        return 2 * int(first.numel()) * int(second.shape[-1])
    if packet in flop_registry:  # those formulas look at tensors, and at the shape of the output
        return int(flop_registry[packet](*args, **kwargs, out_val=output))
    if packet in EXTRA:
        return EXTRA[packet](*_shapes(args))
    if packet is aten.linear:
        return 2 * args[0].numel() * args[1].shape[0]
    return _foreign_attention(func, args)


class Counter(private.dispatch.TorchDispatchMode):
    """Counts the operations of everything that runs while it is entered, without changing it.

    Attributes:
        total: operations so far.
        scopes: operations that ran while a scope was open (:meth:`begin`), by its name.
        attended: names of scopes in which more than linear layers ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.scopes: dict[str, int] = {}
        self.attended: set[str] = set()
        self._open: list[str] = []
        self._counting = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what runs inside this block."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def begin(self, name: str) -> None:
        """Open a scope. Operations count once for a scope that is opened several times."""
        self.scopes.setdefault(name, 0)
        self._open.append(name)

    def end(self, name: str) -> None:
        """Close the scope that was opened last under this name."""
        for place in reversed(range(len(self._open))):
            if self._open[place] == name:
                del self._open[place]
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, private.HigherOrderOperator):
            return func(*args, **kwargs)
        if func in _UNCOUNTED:
            return func(*args, **kwargs)
        packet = func._overloadpacket
        if packet.__name__.removeprefix("sym_") in METADATA:
            return NotImplemented
        if packet not in flop_registry and packet not in EXTRA and packet is not aten.linear:
            with self:  # in inference mode operators arrive here before they are decomposed
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
            if not _is_foreign_attention(func):
                _UNCOUNTED.add(func)
        output = func(*args, **kwargs)
        count = operations(func, args, kwargs, output) if self._counting else None
        if count:
            self.add(count, attended=packet not in LINEAR)
        return output

    def add(self, count: int, attended: bool) -> None:
        """Count operations in all open scopes; ``attended`` if they are of more than linear layers."""
        if not self._counting:
            return
        self.total += count
        for name in set(self._open):
            self.scopes[name] += count
            if attended:
                self.attended.add(name)


@contextmanager
def scoped(counter: Counter, modules: Iterable[tuple[str, Any]]) -> Iterator[None]:
    """Count the operations of each of these modules under its name, within the block; several may share a name."""
    handles = []
    try:
        for name, module in modules:
            handles.append(module.register_forward_pre_hook(_opener(counter, name), prepend=True))
            handles.append(module.register_forward_hook(_closer(counter, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _opener(counter: Counter, name: str) -> Callable[..., None]:
    return lambda *_: counter.begin(name)


def _closer(counter: Counter, name: str) -> Callable[..., None]:
    return lambda *_: counter.end(name)
