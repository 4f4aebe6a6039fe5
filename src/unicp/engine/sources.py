"""May a call be filled from what is kept? Answered on the host alone: nothing is read from the device.

What is kept of a branch may stand in for its output as long as nothing that the output depends on has changed but
latents and timestep: the other arguments, by identity and version; the weights, by their version counters and by what
adapters are in force; and the branch was called at every step since.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tensors.private import pytree
from .clock import version_of, window_of

INPUTS = (
    "arguments of the denoiser changed in the middle of a run ({names}): the next call was computed, and forecasts "
    "began anew"
)
WEIGHTS = "weights or adapters changed in the middle of a run: the next call was computed, and forecasts began anew"
SAME = "the same latents came again at another noise level: these were no steps of a sampler, and were computed"
WINDOWS = (
    "calls of one step differ in their latents alone (context windows?), and nothing tells which is which: everything "
    "was computed; name each window in cache_context, or pass parts of one tensor"
)
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
ADAPTERS = ("scaling", "merged_adapters", "_disable_adapters", "_active_adapter")
"""What peft's layers hold that changes their output without a tensor being written to."""


def identity(value: Any) -> Any:
    """What stays the same as long as a value does: of a tensor, where it lies and how often it was written to."""
    if isinstance(value, torch.Tensor):
        try:
            where: Any = value.data_ptr()
        except (NotImplementedError, RuntimeError):  # a tensor without storage
            where = id(value)
        return where, tuple(value.shape), value.stride(), value.dtype, value.device, version_of(value)
    return value if isinstance(value, PLAIN) else id(value)


TRUE, DOUBTFUL, STALE = "", "doubtful", "stale"
"""What is kept of a branch may be used; may not be used now, but later; is of no use any more."""


@dataclass
class _Seen:
    """The last call of one branch.

    Attributes:
        arguments: by name, the identities of their leaves.
        held: what they are the identities of, so that no other one can take their place in memory.
        hidden: the latents, and their version.
        layout: shape, dtype and device of the latents, and where they lie in a larger tensor.
        position: of the step.
        anew: arguments that are made anew at every call: of these a change cannot be seen.
        doubtful: those that were other ones at the second call than at the first: made anew, or changed.
        calls: how many.
    """

    arguments: dict[str, tuple[Any, ...]]
    held: list[Any]
    hidden: tuple[weakref.ref[Any], int | None] | None
    layout: tuple[Any, ...]
    position: int
    anew: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    calls: int = 1


class Sources:
    """Watches the calls of one denoiser through a run.

    Args:
        denoiser: whose weights count.
        hidden: name of the argument with the latents.
        timesteps: names of those with the noise level.
        say: is told what was computed for a reason found here, in one sentence each.
    """

    def __init__(self, denoiser: Any, hidden: str, timesteps: Sequence[str], say: Callable[[str], None]) -> None:
        self._denoiser = denoiser
        self._hidden = hidden
        self._apart = {hidden, *timesteps}
        self._say = say
        self._weights: tuple[Any, ...] = ()
        self.end()

    def end(self) -> None:
        """Let go of what was held of a run."""
        self._seen: dict[str, _Seen] = {}
        self._stale: set[str] = set()
        self._step: dict[Any, tuple[str, Any, int | None]] = {}  # this step's calls by what they are given
        self._at = -1
        self._windows = False  # that cannot be told apart

    def begin(self) -> None:
        """A run begins."""
        self.end()
        self._weights = tuple(_state(self._denoiser))

    def forget(self, branch: str) -> None:
        """A branch is not called any more in this run."""
        self._seen.pop(branch, None)

    def look(self, branch: str, position: int, call: Mapping[str, Any], leaping: bool) -> str:
        """Take note of a call.

        Args:
            branch, position: which, and the step as the denoiser counts them.
            call: its arguments by name.
            leaping: the solver goes beyond steps in this run, so that the same latents may come again.

        Returns:
            One of :data:`TRUE`, :data:`DOUBTFUL` and :data:`STALE`, of what is kept of the branch. It stays stale until
            :meth:`renewed` is told that it was dropped.
        """
        before = self._seen.get(branch)
        anew = before.anew if before is not None else set()
        leaves = {n: pytree.tree_leaves(v) for n, v in call.items() if n not in self._apart and n not in anew}
        arguments = {name: tuple([identity(leaf) for leaf in values]) for name, values in leaves.items()}
        latents = call.get(self._hidden)
        hidden: tuple[weakref.ref[Any], int | None] | None = None
        layout: tuple[Any, ...] = ()
        if isinstance(latents, torch.Tensor):
            hidden = weakref.ref(latents), version_of(latents)
            layout = (tuple(latents.shape), latents.dtype, latents.device, window_of(latents))
        held = [leaf for values in leaves.values() for leaf in values]
        self._look_beside(branch, position, arguments, latents)
        now = self._seen[branch] = _Seen(arguments, held, hidden, layout, position, anew)
        if before is None:
            return self._state(branch, False)
        now.calls = before.calls + 1
        changed = {n for n in {*arguments, *before.arguments} if arguments.get(n) != before.arguments.get(n)} - anew
        if now.calls == 2:
            now.doubtful, changed = changed, set()
        else:
            made = before.doubtful & changed
            now.anew = anew | made
            changed = (changed | before.doubtful) - made  # one that has not changed again was no such argument
        if layout != before.layout:
            changed.add(self._hidden)
        if changed:
            self._say(INPUTS.format(names=", ".join(sorted(changed))))
        same = position > before.position and not leaping and _one(hidden, before.hidden)
        if same:
            self._say(SAME)
        if changed or same or position > before.position + 1:  # or it was not called at some step
            self._stale.add(branch)
        return self._state(branch, bool(now.doubtful))

    def _state(self, branch: str, doubt: bool) -> str:
        if branch in self._stale:
            return STALE
        return DOUBTFUL if doubt or self._windows else TRUE

    def _look_beside(self, branch: str, position: int, arguments: Mapping[str, Any], latents: Any) -> None:
        """Unnamed calls of one step with all but the latents in common are windows: known by their place, if at all."""
        if position != self._at:
            self._at, self._step = position, {}
        if not branch.startswith("call ") or latents is None or not arguments:
            return
        try:
            other, theirs, place = self._step.setdefault(
                tuple(sorted(arguments.items())), (branch, latents, window_of(latents))
            )
        except TypeError:  # a value that is neither a tensor nor hashed
            return
        if other != branch and theirs is not latents and None in (place, window_of(latents)) and not self._windows:
            self._windows = True
            self._say(WINDOWS)

    def renewed(self, branch: str) -> None:
        """What was kept of a branch was dropped."""
        self._stale.discard(branch)

    def weights_changed(self) -> bool:
        """Whether the denoiser's weights are other ones than when this was asked before, or than when the run began."""
        before, self._weights = self._weights, tuple(_state(self._denoiser))
        if before == self._weights:
            return False
        self._say(WEIGHTS)
        self._stale.update(self._seen)
        return True


def _one(new: tuple[Any, int | None] | None, old: tuple[Any, int | None] | None) -> bool:
    """Whether these are one tensor that nobody wrote to in between; not if that cannot be told."""
    if new is None or old is None or new[1] is None:
        return False
    return new[0]() is old[0]() and new[1] == old[1]


def _state(denoiser: Any) -> Iterator[Any]:
    """What moves when weights are written to, or when adapters are added, weighed, switched, fused or removed.

    Writing through ``.data`` moves nothing.
    """
    for module in denoiser.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield version_of(parameter)
        if "_active_adapter" in vars(module):  # a layer of peft
            yield repr([vars(module).get(name) for name in ADAPTERS])
