"""What a method does, seen from outside and alike for all: which modules ran at each call, and their arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..tensors import metrics
from .harness import denoisers_of


@dataclass
class Call:
    """One call of a denoiser.

    Attributes:
        step: denoising step, from 0.
        branch: number of the call within its step, from 0: the guidance branches in their order.
        share: of the denoiser's parameters, the share whose modules ran, 0 to 1.
        blocks: the same for each block.
        change: relative L1 change of the denoiser's output since the same branch's last call; ``None`` at the first.
    """

    step: int
    branch: int
    share: float
    blocks: list[float]
    change: float | None = None


@dataclass
class Observation:
    """What was seen of one video.

    Attributes:
        calls: in their order.
        blocks: names of the blocks, as :attr:`Call.blocks` counts them.
        flops: floating-point operations inside the denoisers (``torch.utils.flop_counter``: matrix products,
            convolutions and attention), ``None`` if no denoiser ran.
        peak_bytes: most bytes of tensors that were alive at once until the last denoising step was over, without the
            pipeline's weights.
    """

    calls: list[Call] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    flops: int | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rounded: they are for pictures."""
        return {
            "blocks": self.blocks,
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "calls": [
                {
                    "step": call.step,
                    "branch": call.branch,
                    "share": round(call.share, 3),
                    "blocks": [round(share, 2) for share in call.blocks],
                    "change": None if call.change is None else round(call.change, 5),
                }
                for call in self.calls
            ],
        }


class _Observer:
    def __init__(self, seen: Observation, live: Any, counter: Any) -> None:
        self.seen, self.step, self.branch = seen, 0, 0
        self.running: dict[int, int] | None = None
        self.last: dict[tuple[str, int], Any] = {}
        self.sizes: dict[int, int] = {}
        self.live, self.counter = live, counter
        self.counted = 0

    def enter(self, *_: Any) -> None:
        self.running = {}
        self.counted = self._flops()

    def _flops(self) -> int:
        return int(self.counter.get_total_flops())

    def ran(self, block: int, size: int) -> None:
        if self.running is not None:
            self.running[block] = self.running.get(block, 0) + size

    def leave(self, name: str, whole: int, blocks: range, output: Any) -> None:
        running = self.running or {}
        self.running = None
        # Not by module names: a library that calls blocks in its own wrappers confuses torch's tracking of them.
        self.seen.flops = (self.seen.flops or 0) + self._flops() - self.counted
        tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        last = self.last.get((name, self.branch))
        same = last is not None and last.shape == tensor.shape
        change = float(metrics.relative_change(tensor, last)) if same else None
        self.last[name, self.branch] = tensor.detach()
        shares = [min(1.0, running.get(block, 0) / max(1, self.sizes[block])) for block in blocks]
        # Layers may be used more than once a call (embeddings of time and text): a share is never above 1.
        share = min(1.0, sum(running.values()) / whole)
        self.seen.calls.append(Call(self.step, self.branch, share, shares, change))
        self.branch += 1

    def end_step(self) -> None:
        self.step, self.branch = self.step + 1, 0
        self.seen.peak_bytes = self.live.peak


def _size(module: Any) -> int:
    return sum(tensor.numel() for tensor in module.parameters(recurse=False))


def block_lists(denoiser: Any) -> dict[str, Any]:
    """The lists of blocks of a denoiser, by name: its direct children that are module lists with parameters."""
    import torch

    return {
        name: child
        for name, child in denoiser.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) and next(child.parameters(), None) is not None
    }


@contextmanager
def observing(pipe: Any) -> Iterator[tuple[Observation, Any]]:
    """Watch the videos that are made inside. Slows them down: never while timing.

    Yields:
        The observation, and a function to call at the end of every step.
    """
    seen = Observation()
    observer = _Observer(seen, _live_tensors(pipe), _flop_counter())
    denoisers = denoisers_of(pipe)
    with ExitStack() as stack:
        for name, denoiser in denoisers.items():
            first = len(seen.blocks)
            owner: dict[int, int] = {}
            for list_name, blocks in block_lists(denoiser).items():
                for index, block in enumerate(blocks):
                    number = len(seen.blocks)
                    seen.blocks.append(
                        f"{list_name}.{index}" if name == "transformer" else f"{name}.{list_name}.{index}"
                    )
                    observer.sizes[number] = sum(_size(module) for module in block.modules())
                    owner.update({id(module): number for module in block.modules()})
            whole = 0
            for module in denoiser.modules():
                size = _size(module)
                if size and module is not denoiser and not any(True for _ in module.children()):
                    whole += size
                    stack.callback(
                        module.register_forward_pre_hook(_counter(observer, owner.get(id(module), -1), size)).remove
                    )
                elif size and id(module) in owner:
                    # Bare parameters of a block (modulation tables) belong to no layer that is called.
                    observer.sizes[owner[id(module)]] -= size
            span = range(first, len(seen.blocks))
            stack.callback(denoiser.register_forward_pre_hook(observer.enter).remove)
            stack.callback(denoiser.register_forward_hook(_leaver(observer, name, whole, span)).remove)
        stack.enter_context(observer.live)
        stack.enter_context(observer.counter)
        yield seen, observer.end_step


def _counter(observer: _Observer, block: int, size: int) -> Any:
    return lambda *_: observer.ran(block, size)


def _leaver(observer: _Observer, name: str, whole: int, span: range) -> Any:
    return lambda module, inputs, output: observer.leave(name, whole, span, output)


def _flop_counter() -> Any:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    # The CPU's fused attention has no formula in torch; its arithmetic is that of the others.
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    return FlopCounterMode(display=False, depth=1, custom_mapping={} if fused is None else {fused: attention})


def _live_tensors(pipe: Any) -> Any:
    """A mode that adds up the storages of all tensors that come and go, the weights' aside."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.now = self.peak = 0
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    for tensor in (*part.parameters(), *part.buffers()):
                        self.known.add(tensor.untyped_storage()._cdata)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_iter(made):
                if isinstance(tensor, torch.Tensor):
                    self.note(tensor.untyped_storage())
            return made

        def note(self, storage: Any) -> None:
            key = storage._cdata
            if key in self.known:
                return
            size = storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key, size)

        def gone(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    return Live()
