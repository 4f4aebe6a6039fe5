"""A pretended device: models of any size run on it, with the shapes, operations, memory and reads of an accelerator.

Its tensors are torch's ``meta`` tensors, which have no values. Whatever is made on the CPU stays real, so schedulers
and pipelines work as they are. An operator that mixes the two fails, as it does on an accelerator. A read of a value is
answered and recorded. Small tensors whose values follow from the CPU alone (timesteps, masks) keep them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..errors import UnicpError
from ..tensors import flops, metrics, private
from ..tensors.live import LiveBytes
from ..tensors.private import pytree

aten = torch.ops.aten
DEVICE = torch.device("meta")
PACKAGE = str(Path(__file__).resolve().parent.parent)
TORCH = str(Path(torch.__file__).resolve().parent)
MAX_KNOWN_ELEMENTS = 4096
"""Most elements of a tensor that keeps its values, where they are known."""
READING_OPERATORS = {
    aten._local_scalar_dense: "item",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten.equal: "equal",
    aten._unique2: "unique",
    aten.unique_consecutive: "unique",
    aten.repeat_interleave: "repeat_interleave",
}
"""Operators that wait for the device and read from it, with their names in Python."""
CREATING_OPERATORS = {aten.arange, aten.full, aten.zeros, aten.ones, aten.linspace, aten.scalar_tensor}
FILLING_METHODS = {"uniform_", "normal_", "kaiming_uniform_", "trunc_normal_", "xavier_uniform_", "fill_", "zero_"}
FUSED_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
"""The operator that stands for every fused attention kernel; of those in torch, this one takes masks of any kind."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The peak rates of an accelerator.

    Attributes:
        name: name of the accelerator.
        flops: dense floating-point operations per second in bfloat16.
        bandwidth: memory bandwidth in bytes per second.
    """

    name: str
    flops: float
    bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        Device(name="h100", flops=989e12, bandwidth=3.35e12),  # SXM5, without sparsity
        Device(name="h200", flops=989e12, bandwidth=4.8e12),
        Device(name="a100", flops=312e12, bandwidth=2.039e12),  # SXM4, 80 GB
        Device(name="4090", flops=165.2e12, bandwidth=1.008e12),
    )
}


def device_named(text: str) -> Device:
    """An accelerator by its name, or by ``TFLOPS,GBPS``.

    Raises:
        UnicpError: it is neither.

    >>> device_named("500,2000").bandwidth
    2000000000000.0
    """
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    try:
        tflops, gigabytes = (float(part) for part in text.split(","))
        if min(tflops, gigabytes) <= 0 or max(tflops, gigabytes) == float("inf"):
            raise ValueError
    except ValueError:
        raise UnicpError(
            f"--gpu takes {', '.join(DEVICES)} or PEAK_TFLOPS,GB_A_SECOND as in 500,2000; got {text!r:.80}"
        ) from None
    return Device(name=text, flops=tflops * 1e12, bandwidth=gigabytes * 1e9)


@dataclass(frozen=True)
class Read:
    """A value that was fetched from the device.

    Attributes:
        how: the function that read it: ``item`` (also for ``float`` and ``bool``), ``cpu`` (also for ``tolist``), ...
        ours: whether unicp read it, and not the pipeline, its scheduler or the model.
        where: file and line of the caller.
        call: number of denoiser calls that had begun.
    """

    how: str
    ours: bool
    where: str
    call: int


@dataclass
class Work:
    """A cost: operations, bytes of memory read and written, and the seconds that these take at best."""

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def plus(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)

    def minus(self, other: Work) -> Work:
        return Work(self.flops - other.flops, self.bytes - other.bytes, self.seconds - other.seconds)


@dataclass
class _Kind:
    """How the pretended device handles an operator."""

    packet: Any
    in_place: bool
    views: bool
    plain: bool  # equal input shapes always give equal output shapes, in new memory


class Pretend(private.dispatch.TorchDispatchMode):
    """The pretended device, while it is entered.

    Args:
        device: its rates give :attr:`Work.seconds`: an operator takes the longer of operations / flops and bytes /
            bandwidth.
        answer: returns the result of reading an unknown value, given how many denoiser calls have begun since the last
            such read.
        double: whether the device has float64. If not (MPS), an operator that makes float64 fails.

    Attributes:
        reads: all reads, in order.
        calls: number of denoiser calls that have begun; whoever runs the loop counts them.
        work: cost of everything so far.
        memory: bytes of tensors on the device, without weights, and their peak since :meth:`mark`.
    """

    def __init__(
        self,
        device: Device = DEVICES["h100"],
        *,
        answer: Callable[[int], float] = lambda calls: 0.05,
        double: bool = True,
    ) -> None:
        super().__init__()
        self.device, self.answer, self.double = device, answer, double
        self.reads: list[Read] = []
        self.calls = 0
        self._answered = 0
        self.work = Work()
        self.memory = LiveBytes()
        self._kinds: dict[Any, _Kind] = {}
        self._shapes: dict[Any, tuple[Any, Work]] = {}
        self._measured = _Known(self)
        self._stack = ExitStack()

    def __enter__(self) -> Pretend:
        self._stack.enter_context(_Fused())
        self._stack.enter_context(_autocast_is_no_error())
        self._stack.enter_context(_measuring_once(self._measured))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._stack.close()

    def mark(self) -> None:
        """Begin to record a new peak."""
        self.memory.peak = self.memory.now

    def weights(self, module: torch.nn.Module) -> int:
        """Stop counting the tensors of a module. Returns their size in bytes."""
        size = 0
        for tensor in (*module.parameters(), *module.buffers()):
            self.memory.leave_out(tensor)
            size += tensor.untyped_storage().nbytes()
        return size

    # -- operators -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, private.HigherOrderOperator):
            return func(*args, **kwargs)
        there = [tensor for tensor in _tensors(args) if tensor.is_meta]
        wanted = kwargs.get("device")
        if not there and (wanted is None or torch.device(wanted).type != "meta"):
            return func(*args, **kwargs)
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        to_host = wanted is not None and torch.device(wanted).type == "cpu"
        if (
            kind.packet in READING_OPERATORS
            or (there and to_host)
            or (kind.packet is aten.copy_ and not args[0].is_meta)
        ):
            return self._read(func, kind, args, kwargs)
        if kind.packet in (aten.index, aten.index_put, aten.index_put_):
            args = self._indexed(args)
        output = self._shaped(func, kind, args, kwargs, there)
        self._follow(func, kind, args, kwargs, output)
        return output

    def _shaped(self, func: Any, kind: _Kind, args: Any, kwargs: Any, there: list[Any]) -> Any:
        """An output of the right shape, from the operator itself the first time and from memory later."""
        if kind.views:
            return func(*args, **kwargs)
        key = (func, _described(args), _described(tuple(kwargs.items())))
        known = self._shapes.get(key)
        if known is None:
            output = self._first(func, kind, args, kwargs)
            work = self._work(func, args, kwargs, output)
            remembered = _recipe(output) if kind.plain else None
            self._shapes[key] = (remembered, work)
        else:
            remembered, work = known
            if remembered is not None:
                output = _made(remembered)
            elif kind.in_place:
                output = args[0]
            else:
                output = func(*args, **kwargs)
        self.work = self.work.plus(work)
        for tensor in _tensors((output,)):
            self.memory.note(tensor)
        return output

    def _first(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        if kind.packet is FUSED_ATTENTION:
            query, _, value = args[:3]
            shape = (*query.shape[:-1], value.shape[-1])
            made = query.new_empty((shape[0], shape[2], shape[1], shape[3])).transpose(1, 2)
            return made, query.new_empty(query.shape[:-1], dtype=torch.float32)
        others = [tensor for tensor in _tensors(args) if not tensor.is_meta and tensor.ndim]
        if others and kind.packet not in (aten.copy_, aten._to_copy, aten.index, aten.index_put, aten.index_put_):
            raise UnicpError(
                f"{kind.packet.__name__} was given tensors of two devices: one on the CPU, of shape "
                f"{tuple(others[0].shape)}, beside one of the model's"
            )
        output = func(*args, **kwargs)
        if not self.double and any(t.dtype == torch.float64 for t in _tensors((output,)) if t.is_meta):
            raise UnicpError(f"{kind.packet.__name__} makes float64, which the device does not have")
        return output

    def _work(self, func: Any, args: Any, kwargs: Any, output: Any) -> Work:
        count = flops.operations(func, args, kwargs, output) or 0
        moved = sum(t.numel() * t.element_size() for t in (*_tensors(args), *_tensors((output,))) if t.is_meta)
        return Work(count, moved, max(count / self.device.flops, moved / self.device.bandwidth))

    # -- reads and values ------------------------------------------------------------------------------------------

    def _read(self, func: Any, kind: _Kind, args: Any, kwargs: Any) -> Any:
        self.reads.append(Read(READING_OPERATORS.get(kind.packet, "cpu"), *_asked_by(), self.calls))
        values = [_value(tensor) for tensor in _tensors(args)]
        known = all(value is not None for value in values)
        answer = 0.0
        if not known:
            answer = self.answer(self.calls - self._answered)
            self._answered = self.calls
        here = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        if known:
            result = func(*pytree.tree_map_only(torch.Tensor, _value, args), **here)
        elif kind.packet is aten._local_scalar_dense:
            dtype = args[0].dtype
            return answer if dtype.is_floating_point else dtype == torch.bool or 1
        elif kind.packet is aten.equal:
            return False
        elif kind.packet is aten.nonzero:  # every element, as the values are unknown
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif kind.packet is aten.copy_:
            return args[0].fill_(answer)
        elif kind.packet is aten._to_copy:
            return torch.full(args[0].shape, answer, dtype=kwargs.get("dtype") or args[0].dtype)
        else:
            raise UnicpError(f"{kind.packet.__name__} reads values that a rehearsal does not have")
        if isinstance(result, torch.Tensor) and kind.packet in READING_OPERATORS:  # stays on the device
            moved = result.to(DEVICE)
            _remember(moved, result)
            return moved
        return result

    def _indexed(self, args: Any) -> Any:
        """The arguments with masks among the indices replaced by places: a mask is read to know how many there are."""
        indices = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                self.reads.append(Read("index by a mask", *_asked_by(), self.calls))
                value = _value(index)
                places = value.nonzero() if value is not None else torch.ones(index.shape, dtype=torch.bool).nonzero()
                indices += [places[:, axis].to(DEVICE) for axis in range(index.ndim)]
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _follow(self, func: Any, kind: _Kind, args: Any, kwargs: Any, output: Any) -> None:
        """Keep the values of small tensors that follow from known ones."""
        made = list(_tensors((output,)))
        if not made or any(tensor.numel() > MAX_KNOWN_ELEMENTS for tensor in made):
            return
        inputs = list(_tensors(args))
        values = [_value(tensor) for tensor in inputs]
        if any(value is None for value in values) or (not inputs and kind.packet not in CREATING_OPERATORS):
            if kind.in_place:
                _remember(args[0], None)
            return
        here = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        found = func(*pytree.tree_map_only(torch.Tensor, _value, args), **here)
        if not kind.in_place:
            for tensor, value in zip(made, _tensors((found,)), strict=True):
                _remember(tensor, value)


class _Fused(TorchFunctionMode):
    """Sends attention to one fused kernel, as accelerators have it, instead of decomposing it into products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and any(t.is_meta for t in _tensors((*args, *kwargs.values()))):
            return _fused(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _autocast_is_no_error() -> Iterator[None]:
    """Let models use autocast on the pretended device, where it does nothing; it changes no shape."""
    own = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == DEVICE.type else own(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = own  # type: ignore[misc]


class Unfilled(TorchFunctionMode):
    """While this is entered, modules that are made on the device do not initialise their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in FILLING_METHODS and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))


def _fused(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    shape = query.shape
    query, key, value = (t.reshape(-1, *t.shape[-3:]) for t in (query, key, value))
    key, value = (t.expand(query.shape[0], *t.shape[1:]) for t in (key, value))
    made = FUSED_ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return made if len(shape) == 4 else made.reshape(*shape[:-1], made.shape[-1])


def _kind(func: Any) -> _Kind:
    schema = func._schema
    written = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    shared = any(result.alias_info is not None for result in schema.returns)
    in_place = written and schema.name.endswith("_")
    views = shared and not written
    drawn = not written and not shared
    return _Kind(func._overloadpacket, in_place, views or (written and not in_place), drawn)


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _described(value: Any) -> Any:
    """A hashable description of a call's arguments by their shapes alone."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.stride(), value.dtype, value.is_meta)
    if isinstance(value, (list, tuple)):
        return tuple([_described(each) for each in value])
    return (type(value), value) if isinstance(value, (bool, int, float, str)) else repr(value)


def _recipe(output: Any) -> Any:
    """A recipe to make such an output again, or ``None`` if it is not of tensors only."""
    leaves, structure = pytree.tree_flatten(output)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return None
    return [(tuple(leaf.shape), leaf.stride(), leaf.dtype) for leaf in leaves], structure


def _made(recipe: Any) -> Any:
    described, structure = recipe
    made = [torch.empty_strided(shape, stride, dtype=dtype, device=DEVICE) for shape, stride, dtype in described]
    return made[0] if len(made) == 1 and structure.is_leaf() else pytree.tree_unflatten(made, structure)


def _value(tensor: Any) -> Any:
    return tensor.__dict__.get("_unicp_value") if tensor.is_meta else tensor


def _remember(tensor: Any, value: Any) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.is_meta:
        tensor._unicp_value = value  # type: ignore[attr-defined]


def _asked_by() -> tuple[bool, str]:
    """Whether unicp caused the present read, and the file and line of the caller."""
    frame: Any = sys._getframe(1)
    where, ours, solver = "", False, False
    while frame is not None:
        name = frame.f_code.co_filename
        if not where and not name.startswith((TORCH, "<")) and name not in (__file__, flops.__file__):
            where, ours = f"{Path(name).name}:{frame.f_lineno}", name.startswith(PACKAGE)
        # We run schedulers on a few numbers to find their weights: those reads are ours. What stands in for a
        # scheduler's step in the loop (``__call__``) only calls it: those are the scheduler's own.
        probes = name.endswith("response.py") and frame.f_code.co_name != "__call__"
        solver = solver or (probes and name.startswith(PACKAGE))
        frame = frame.f_back
    return ours or solver, where


class _Known:
    """What calls did, by their shapes: each is made once, then its outputs, its cost and its memory are repeated."""

    def __init__(self, pretend: Pretend) -> None:
        self._pretend = pretend
        self._known: dict[Any, tuple[Any, Work, int]] = {}

    def again(self, key: Any, counter: Any, run: Callable[[], Any]) -> Any:
        """What a call returns. It runs if no call of this key is known, and tells ``counter`` its operations if not."""
        known = self._known.get(key)
        if known is None:
            return self._first(key, run)
        pretend, (recipe, work, above) = self._pretend, known
        pretend.work = pretend.work.plus(work)
        if counter is not None:
            counter.add(work.flops, attended=True)
        pretend.memory.peak = max(pretend.memory.peak, pretend.memory.now + above)
        output = _made(recipe)
        for tensor in _tensors((output,)):
            pretend.memory.note(tensor)
        return output

    def _first(self, key: Any, run: Callable[[], Any]) -> Any:
        pretend = self._pretend
        before, reads, held, peak = pretend.work, len(pretend.reads), pretend.memory.now, pretend.memory.peak
        pretend.mark()
        output = run()
        above, pretend.memory.peak = pretend.memory.peak - held, max(peak, pretend.memory.peak)
        recipe = _recipe(output)
        if recipe is not None and len(pretend.reads) == reads:
            self._known[key] = (recipe, pretend.work.minus(before), above)
        return output


@contextmanager
def _measuring_once(known: _Known) -> Iterator[None]:
    """Let each pair of shapes be measured once and repeated afterwards: large tensors are measured in many pieces."""
    own = {name: getattr(metrics, name) for name in ("distances", "sizes")}

    def once(name: str) -> Callable[..., Any]:
        def measured(*tensors: Any) -> Any:
            if not all(each.is_meta for each in tensors):
                return own[name](*tensors)
            return known.again((name, _described(tensors)), None, lambda: own[name](*tensors))

        return measured

    for name in own:
        setattr(metrics, name, once(name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(metrics, name, function)


class Replayed:
    """Replaces a module's forward on the pretended device: it repeats the effects of a known call without running it.

    The module runs if hooks watch a part of it, or if another mode looks at operators.

    Args:
        pretend: the pretended device.
        module: the module.
        counted: whether a :class:`~unicp.tensors.flops.Counter` may be told the module's operations instead of seeing
            it run. Then nothing inside it may be a scope of its own.
    """

    def __init__(self, pretend: Pretend, module: Any, counted: bool = False) -> None:
        self._pretend, self._module, self._forward, self._counted = pretend, module, module.forward, counted
        self._known = _Known(pretend)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        modes = private.dispatch._get_current_dispatch_mode_stack()
        if self._pretend not in modes:  # of an earlier rehearsal of the same pipeline
            return self._forward(*args, **kwargs)
        top = modes[-1]
        counter = top if isinstance(top, flops.Counter) and self._counted else None
        if (top is not self._pretend and counter is None) or any(
            _watched(part) for part in self._module.modules() if part is not self._module
        ):
            return self._forward(*args, **kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        processor = type(getattr(self._module, "processor", None))
        # Structures cannot be hashed before torch 2.7.
        key = (_described(leaves), repr(structure), processor if processor.__module__ != "builtins" else None)
        return self._known.again(key, counter, lambda: self._forward(*args, **kwargs))


def _watched(module: Any) -> bool:
    """Whether hooks watch this very module."""
    own = module.__dict__
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own.get(private.HOOK_REGISTRY))


def by_place(reads: list[Read]) -> dict[str, int]:
    """Number of reads by file and line."""
    return dict(Counter(read.where for read in reads).most_common())
