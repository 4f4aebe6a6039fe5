"""Observes any method from outside: which blocks ran at each call, and how many operations they took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..tensors import metrics
from ..tensors.flops import Counter, scoped
from .harness import denoisers_of


@dataclass
class Call:
    """One call of a denoiser.

    Attributes:
        step: denoising step, from 0.
        branch: number of the call within its step, from 0; the guidance branches come in their order.
        operations: floating-point operations that ran.
        blocks: floating-point operations that ran in each block of the denoiser that was called.
        first: number of its first block among those of all denoisers.
        change: relative L1 change of the denoiser's output since the same branch's last call; ``None`` at the first.
    """

    step: int
    branch: int
    operations: int
    blocks: list[int]
    first: int
    change: float | None = None


@dataclass
class Observation:
    """What was observed while one video was made.

    Attributes:
        calls: calls of the denoisers, in order.
        blocks: names of the blocks of all denoisers, in the order of :attr:`Call.blocks`.
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
        """Plain values, rounded for pictures. Shares refer to the most operations of any call of the same branch of the
        same denoiser.
        """
        most: dict[tuple[int, int], int] = {}
        most_of_blocks: dict[tuple[int, int], list[int]] = {}
        for call in self.calls:
            kind = call.first, call.branch
            most[kind] = max(most.get(kind, 0), call.operations)
            known = most_of_blocks.get(kind, [0] * len(call.blocks))
            most_of_blocks[kind] = [max(pair) for pair in zip(known, call.blocks, strict=True)]
        return {
            "blocks": self.blocks,
            "flops": self.flops,
            "peak_bytes": self.peak_bytes,
            "calls": [
                {
                    "step": call.step,
                    "branch": call.branch,
                    "share": round(call.operations / max(1, most[call.first, call.branch]), 3),
                    "blocks": [
                        round(ran / max(1, all_of_it), 2)
                        for ran, all_of_it in zip(call.blocks, most_of_blocks[call.first, call.branch], strict=True)
                    ],
                    "first": call.first,
                    "change": None if call.change is None else round(call.change, 5),
                }
                for call in self.calls
            ],
        }


class _Observer:
    def __init__(self, seen: Observation, live: Any, counter: Counter) -> None:
        self.seen, self.step, self.branch = seen, 0, 0
        self.last: dict[tuple[str, int], Any] = {}
        self.live, self.counter = live, counter
        self.before: list[int] = []

    def _counts(self, blocks: range) -> list[int]:
        return [self.counter.total, *(self.counter.scopes.get(str(block), 0) for block in blocks)]

    def enter(self, blocks: range) -> None:
        self.before = self._counts(blocks)

    def leave(self, name: str, blocks: range, output: Any) -> None:
        ran, *of_blocks = [now - then for now, then in zip(self._counts(blocks), self.before, strict=True)]
        self.seen.flops = (self.seen.flops or 0) + ran
        tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
        last = self.last.get((name, self.branch))
        same = last is not None and last.shape == tensor.shape
        change = float(metrics.relative_change(tensor, last)) if same else None
        self.last[name, self.branch] = tensor.detach()
        self.seen.calls.append(Call(self.step, self.branch, ran, of_blocks, blocks.start, change))
        self.branch += 1

    def end_step(self) -> None:
        self.step, self.branch = self.step + 1, 0
        self.seen.peak_bytes = self.live.memory.peak


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
    """Observe the video that is made within the block. This slows it down, so it must not be timed.

    Yields:
        The observation, and a function to call at the end of every step.
    """
    seen = Observation()
    observer = _Observer(seen, _live_tensors(pipe), Counter())
    with ExitStack() as stack:
        for name, denoiser in denoisers_of(pipe).items():
            first = len(seen.blocks)
            scopes = []
            for list_name, blocks in block_lists(denoiser).items():
                for index, block in enumerate(blocks):
                    scopes.append((str(len(seen.blocks)), block))
                    seen.blocks.append(
                        f"{list_name}.{index}" if name == "transformer" else f"{name}.{list_name}.{index}"
                    )
            stack.enter_context(scoped(observer.counter, scopes))
            span = range(first, len(seen.blocks))
            stack.callback(denoiser.register_forward_pre_hook(_enterer(observer, span)).remove)
            stack.callback(denoiser.register_forward_hook(_leaver(observer, name, span)).remove)
        stack.enter_context(observer.live)
        stack.enter_context(observer.counter)
        yield seen, observer.end_step


def _enterer(observer: _Observer, span: range) -> Any:
    return lambda *_: observer.enter(span)


def _leaver(observer: _Observer, name: str, span: range) -> Any:
    return lambda module, inputs, output: observer.leave(name, span, output)


def _live_tensors(pipe: Any) -> Any:
    """A dispatch mode that adds up the storages of all live tensors, without weights."""
    import torch

    from ..tensors.live import LiveBytes
    from ..tensors.private import dispatch, pytree

    class Live(dispatch.TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.memory = LiveBytes()
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    for tensor in (*part.parameters(), *part.buffers()):
                        self.memory.leave_out(tensor)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in pytree.tree_iter(made):
                if isinstance(tensor, torch.Tensor):
                    self.memory.note(tensor)
            return made

    return Live()
