"""The fill of a stack of blocks: the residual that all of them together add to the input of the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UnicpError
from ...policies.base import Decision, Step
from ...specs import BlockList, ModelSpec
from ...tensors.layout import relayout
from ..arguments import parameters
from .kept import Kept

Forward = Callable[..., Any]


class StackFill:
    """The stack's residual in one guidance branch: one tensor per stream, in the last block's layout."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.blocks = 0  # number of blocks that acted when the residual was kept
        self.checked: set[int] = set()  # blocks that were seen to return each stream in the shape in which it came

    def tensors(self) -> list[Any]:
        """Every tensor that is held."""
        return self.kept.tensors()

    def keep(self, step: Step, entered: list[Any], left: list[Any]) -> None:
        """Keep the residual of each stream; ``None`` stands for a stream that is missing (a video without sound)."""
        pairs = zip(entered, left, strict=True)
        self.kept.keep(step, [None if before is None else (after - before).detach() for before, after in pairs])

    def fill(self, step: Step, decision: Decision, entered: list[Any]) -> list[Any]:
        """The streams as they leave the stack, given how they entered it."""
        added = self.kept.fill(step, decision)
        return [
            before if residual is None else before + residual for before, residual in zip(entered, added, strict=True)
        ]


@dataclass
class StackCall:
    """A denoiser call in progress, as its blocks see it."""

    step: Step
    decision: Decision
    fill: StackFill
    batch: int
    frames: int
    entry: list[Any] = field(default_factory=list)  # the streams as they enter the first block
    acted: int = 0  # number of blocks whose acts have run
    left: bool = False  # whether the last block's act has run, after the first one's
    runs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.runs = self.decision.runs  # asked in every block


class Stack:
    """The blocks of one denoiser. They act while ``call`` is set, and run as they are otherwise.

    Args:
        denoiser, spec: the transformer and its structure.
        watched: blocks in which something measures.
        run_watched: called with such a block, its forward and its arguments, to run it.

    Attributes:
        acts: pairs of a block and the function that replaces its forward; the host puts it there.
    """

    def __init__(
        self,
        denoiser: Any,
        spec: ModelSpec,
        watched: Sequence[Any] = (),
        run_watched: Callable[..., Any] | None = None,
    ) -> None:
        self.call: StackCall | None = None
        self._denoiser, self._spec = type(denoiser).__name__, spec
        self._watched, self._run_watched = list(watched), run_watched
        whole = spec.stack(denoiser)
        self.blocks = [block for _, block, _ in whole]
        self._first, self._last = whole[0][2].layout, len(whole) - 1
        self.acts = [
            (block, self._act_of(position, name, block, described))
            for position, (name, block, described) in enumerate(whole)
        ]

    def _act_of(self, position: int, name: str, block: Any, described: BlockList) -> Callable[..., Any]:
        streams, names = described.streams, parameters(block)
        missing = [stream for stream in streams if stream not in names]
        if missing:
            raise UnicpError(f"blocks of {described.path!r} take no argument {missing[0]!r}; they take: {names}")
        places = [names.index(stream) for stream in streams]
        run_watched = self._run_watched if any(block is other for other in self._watched) else None
        in_between = position not in (0, self._last) and run_watched is None

        def act(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self.call
            if call is None:
                return forward(*args, **kwargs)
            call.acted += 1
            if in_between and call.runs and position in call.fill.checked:
                return forward(*args, **kwargs)  # as most blocks do; every microsecond counts
            values = [
                args[place] if place < len(args) else kwargs.get(stream)
                for place, stream in zip(places, streams, strict=True)
            ]
            if position == 0:
                call.entry = values
            last = position == self._last and bool(call.entry)
            call.left |= last
            if call.runs:
                output = run_watched(block, forward, args, kwargs) if run_watched else forward(*args, **kwargs)
                if position not in call.fill.checked:
                    self._check(name, described, values, output)
                    call.fill.checked.add(position)
                if last:
                    self._keep(call, described, output)
                return output
            if last:
                filled = call.fill.fill(call.step, call.decision, self._entered(call, described))
                values = filled + values[len(filled) :]
            return values[0] if len(values) == 1 else tuple(values)

        return act

    def whole(self, call: StackCall) -> bool:
        """Whether, in a call that has ended, all blocks that there are have acted, as far as can be told."""
        if call.left and call.acted >= (1 if call.runs else call.fill.blocks):
            call.fill.blocks = call.acted
            return True
        return False

    def _entered(self, call: StackCall, described: BlockList) -> list[Any]:
        """The kept streams as they entered the stack, in the last block's layout."""
        video, *others = call.entry
        entered = relayout(video, self._first, described.layout, call.batch, call.frames)
        return [entered, *others][: self._spec.kept]

    def _keep(self, call: StackCall, described: BlockList, output: Any) -> None:
        outputs = list(output if isinstance(output, tuple) else (output,))[: self._spec.kept]
        entered = self._entered(call, described)
        before, after = [shape_of(value) for value in entered], [shape_of(value) for value in outputs]
        if before != after:
            raise UnicpError(
                f"{self._denoiser}: the blocks are entered with {' and '.join(map(str, before))} and left at "
                f"{described.path!r} as {' and '.join(map(str, after))}; it cannot be cached. Check its spec"
            )
        call.fill.keep(call.step, entered, outputs)

    def _check(self, name: str, described: BlockList, values: list[Any], output: Any) -> None:
        """Check that a block has returned each stream in the shape in which it came.

        Raises:
            UnicpError: it has not.
        """
        returned = output if isinstance(output, tuple) else (output,)
        took, gave = [shape_of(value) for value in values], [shape_of(value) for value in returned]
        if took != gave:
            raise UnicpError(
                f"block {name!r} of {self._denoiser} took {' and '.join(described.streams)} of shape "
                f"{' and '.join(map(str, took))} and returned {' and '.join(map(str, gave))}; only blocks that return "
                "what they took, changed, can be passed over. Describe it with a ModelSpec (see BlockList.streams), or "
                "use a ScheduleConfig, which needs no blocks"
            )


def shape_of(value: Any) -> Any:
    """The shape of a tensor as a tuple; of anything else, its type's name."""
    return tuple(value.shape) if hasattr(value, "shape") else type(value).__name__
