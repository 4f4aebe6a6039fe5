"""Measurements of what was computed. Tensors are captured by ordinary module hooks and compared on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import UnicpError
from ..policies.base import Needs
from ..specs import BlockList, ModelSpec
from ..tensors import extrapolation, metrics
from ..tensors.groups import gathered
from ..tensors.layout import by_frame


def forecast_error(output: Any, kept: Sequence[Any], sigmas: Sequence[float], sigma: float) -> Any:
    """Relative L2 distance between an output and its linear forecast, of the worst sample.

    Args:
        output: what was computed, (B, ...).
        kept: outputs of the last computed steps, newest first.
        sigmas: their noise levels.
        sigma: noise level of ``output``.

    Returns:
        A scalar tensor; ``None`` where there is nothing to forecast from yet.
    """
    if not kept or sigma in sigmas or kept[0].shape != output.shape:
        return None
    forecast = extrapolation.extrapolate(kept[:2], extrapolation.weights(sigmas[:2], sigma))
    forecast, truth = (x.float().reshape(len(x) if x.dim() else 1, -1) for x in (forecast, output))
    return ((forecast - truth).norm(dim=1) / truth.norm(dim=1)).max()


class Captured(NamedTuple):
    """The residual of one measured block: (B, F, S, C), and ``sum|p|`` of each sample, (B,)."""

    residual: Any
    size: Any


class Measured(NamedTuple):
    """Scalar tensors of what was measured in a call; ``None`` where there was nothing to compare with.

    Attributes:
        change: how much the residuals differ from those of the last measured call.
        motion: the motion score of the residuals.
    """

    change: Any = None
    motion: Any = None


class Probe:
    """Captures one sub-layer's residual in the measured blocks of a denoiser, from :meth:`arm` to :meth:`measured`.

    The residual of a sub-layer, after its gate, is the hidden states where the next sub-layer begins minus the
    hidden states where the sub-layer itself begins. So no block's forward has to be known. It is compared at once,
    while it is in the processor's cache.

    Args:
        denoiser, spec: the transformer and its structure.
        needs: says what is measured, and in which blocks.
        eagerly: takes what would run a module, and the module; returns what runs it uncompiled.

    Raises:
        UnicpError: the blocks have no such sub-layer.
    """

    def __init__(self, denoiser: Any, spec: ModelSpec, needs: Needs, eagerly: Callable[[Any, Any], Any]) -> None:
        self._eagerly = eagerly
        self.here: Callable[[], bool] = lambda: True  # whether a call comes from the thread whose video is measured
        self.group: Any = None  # processes among which the tokens are divided
        self._strides = needs.strides
        self.disarm()
        self._places: list[tuple[Any, Any, Any, Any, Any]] = []  # block, module and hook of both ends
        self._handles: list[Any] = []
        whole = spec.blocks(denoiser)
        measured = [position for position, (_, _, described) in enumerate(whole) if described.measured]
        blocks = [whole[position][1:] for position in measured]
        last = len(blocks) - 1
        chosen = {"start": [0], "mid": [len(blocks) // 2], "end": [last], "all": list(range(len(blocks)))}
        self.layout = blocks[0][1].layout
        self.blocks = tuple(measured[position] for position in chosen[needs.location])
        for position in chosen[needs.location]:
            self._watch(position, *blocks[position], needs.metric or "block", spec)
        self.modules = [block for block, *_ in self._places]
        self.place()

    def _watch(self, position: int, block: Any, described: BlockList, kind: str, spec: ModelSpec) -> None:
        names = list(described.residuals)
        if kind == "block":
            begin, end = None, None
        elif kind in names:
            begin = described.residuals[kind]
            following = names.index(kind) + 1
            end = described.residuals[names[following]] if following < len(names) else None
        else:
            raise UnicpError(
                f"metric_kind {kind!r} cannot be measured on the family {spec.family!r}; it has: "
                f"{', '.join([*names, 'block'])}"
            )
        stream = described.streams[0]

        def start(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.armed and self.here():
                self._starts[position] = kwargs[stream] if stream in kwargs else args[0]

        def stop(hidden: Any) -> None:
            if self.armed and self.here() and position in self._starts:
                source = self._starts.pop(position)
                if hidden.shape != source.shape:
                    raise UnicpError(
                        f"the residual of {kind!r} in block {position} ({described.path}) of {spec.family} begins as "
                        f"{tuple(source.shape)} and ends as {tuple(hidden.shape)}; check `residuals` in its spec"
                    )
                self._compare(position, (hidden - source).detach().to(source.dtype))

        def stop_before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stop(kwargs[stream] if stream in kwargs else args[0])

        def stop_after(_: Any, __: Any, output: Any) -> None:
            stop(output[0] if isinstance(output, tuple) else output)

        first = block if begin is None else block.get_submodule(begin)
        last = block if end is None else block.get_submodule(end)
        self._places.append((block, first, start, last, stop_after if end is None else stop_before))

    @staticmethod
    def _attach(block: Any, first: Any, start: Any, last: Any, stop: Any) -> list[Any]:
        entering = first.register_forward_pre_hook(start, with_kwargs=True)
        if last is block:
            return [entering, block.register_forward_hook(stop)]
        return [entering, last.register_forward_pre_hook(stop, with_kwargs=True)]

    def place(self, gated: bool = False) -> None:
        """Watch the measured blocks; ``gated``, as for a compiled denoiser, only while :meth:`run` runs one."""
        if gated:
            self._detach()
        elif not self._handles:
            self._handles = [handle for place in self._places for handle in self._attach(*place)]

    def run(self, block: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block of a compiled denoiser: uncompiled and watched if it is measured in this call, else as it is."""
        place = next((place for place in self._places if place[0] is block), None)
        if place is None or not self.armed or self._handles:
            return forward(*args, **kwargs)
        _, first, start, last, stop = place
        handles = []
        if first is block:  # we are inside its call already: too late for hooks on the block itself
            start(block, args, kwargs)
        else:
            handles.append(first.register_forward_pre_hook(start, with_kwargs=True))
        if last is not block:
            handles.append(last.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            output = self._eagerly(forward, block)(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if last is block:
            stop(block, args, output)
        return output

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def remove(self) -> None:
        """Watch nothing any more."""
        self._detach()
        self.disarm()

    def disarm(self) -> None:
        """Forget what was captured in a call that broke off."""
        self.armed = False
        self._batch, self._frames = 1, 1
        self._starts: dict[int, Any] = {}
        self._old: Mapping[int, Captured] = {}
        self._new: dict[int, Captured] = {}
        self._changes: dict[int, Any] = {}
        self._motions: dict[int, Any] = {}

    def arm(self, old: Mapping[int, Captured], batch: int, frames: int) -> None:
        """Measure in the call that follows.

        Args:
            old: what was captured in the last measured call.
            batch: samples in the call.
            frames: token frames of each sample.
        """
        self.disarm()
        self.armed, self._old, self._batch, self._frames = True, old, batch, frames

    def _compare(self, position: int, residual: Any) -> None:
        """Compare the residual in a block with the one that was captured there before."""
        whole = residual if self.group is None else gathered(residual, self.group)
        tokens = by_frame(whole, self.layout, self._batch, self._frames)
        if self._strides and self._frames > min(self._strides):  # a single frame has no motion
            of_frames = metrics.frame_sizes(tokens)
            self._motions[position] = metrics.frame_difference(tokens, self._strides, of_frames)
            size = of_frames.sum(1)
        else:
            size = metrics.sizes(tokens.flatten(1))
        if position in self._old:
            self._changes[position] = metrics.relative_change(tokens, *self._old[position])
        self._new[position] = Captured(tokens, size)

    def measured(self) -> tuple[Measured, dict[int, Captured]]:
        """What was measured since the probe was armed, and what was captured, by block, for the next comparison.

        Raises:
            UnicpError: nothing was captured.
        """
        new, found = self._new, Measured(_mean(self._changes), _mean(self._motions))
        self.disarm()
        if not new:
            raise UnicpError("no residual was captured: the measured blocks did not run as the model's spec says")
        return found, new


def _mean(scalars: Mapping[int, Any]) -> Any:
    """Their mean, on the device of the first; ``None`` if there are none."""
    if len(scalars) < 2:
        return next(iter(scalars.values()), None)
    first, *others = scalars.values()
    return torch.stack([first, *(each.to(first.device) for each in others)]).mean()
