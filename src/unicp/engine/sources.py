"""Decides whether a call may be filled from what is kept. It works on the host: nothing is read from the device.

What is kept of a branch may stand in for its output as long as the branch is called at every step and nothing but
latents and timestep changes. The other arguments are compared by identity and version, the weights by their version
counters and by the adapters in force.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tensors.host import version_of
from .arguments import leaves
from .clock import window_of

ARGUMENTS_NOTE = (
    "arguments of the denoiser changed in the middle of a run ({names}): the next call was computed, and forecasts "
    "began anew"
)
WEIGHTS_NOTE = (
    "weights or adapters changed in the middle of a run: the next call was computed, and forecasts began anew"
)
LATENTS_NOTE = "the same latents came again at another noise level: these were no steps of a sampler, and were computed"
WINDOWS_NOTE = (
    "calls of one step differ in their latents alone (context windows?), and nothing tells which is which: everything "
    "was computed; name each window in cache_context, or pass parts of one tensor"
)
PLAIN_TYPES = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
ADAPTER_ATTRIBUTES = ("scaling", "merged_adapters", "_disable_adapters", "_active_adapter")
"""Attributes of peft's layers that change their output without a tensor being written to."""


def identity(value: Any) -> Any:
    """A value that changes whenever ``value`` does: for a tensor, its address, layout and version counter."""
    if isinstance(value, PLAIN_TYPES):
        return value
    if isinstance(value, torch.Tensor):
        try:
            where: Any = value.data_ptr()
        except (NotImplementedError, RuntimeError):  # a tensor without storage
            where = id(value)
        return where, tuple(value.shape), value.stride(), value.dtype, value.device, version_of(value)
    return id(value)


JUDGED = 4
"""Calls of a branch after which it is known which arguments are made anew at each."""

USABLE, DOUBTFUL, STALE = "", "doubtful", "stale"
"""States of what is kept of a branch: it may be used; it may not be used now, but perhaps later; it is outdated."""


@dataclass
class _Seen:
    """The last call of one branch.

    Attributes:
        arguments: identities of the leaves of each argument, by name.
        held: those leaves themselves, so that nothing else can take their place in memory.
        hidden: the latents, and their version.
        layout: shape, dtype and device of the latents, and their offset in a larger tensor.
        position: position of the step in the run.
        anew: arguments that are made anew at every call: a change of these cannot be seen.
        doubtful: arguments that differed between the first and the second call: either made anew, or changed.
        calls: number of calls so far.
        older: what ``arguments`` and ``held`` were at the call before the last, in the first :data:`JUDGED` calls.
    """

    arguments: dict[str, tuple[Any, ...]]
    held: list[Any]
    hidden: tuple[weakref.ref[Any], int | None] | None
    layout: tuple[Any, ...]
    position: int
    anew: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    calls: int = 1
    older: tuple[dict[str, tuple[Any, ...]], list[Any]] | None = None


class Sources:
    """Watches the calls of one denoiser through a run.

    Args:
        denoiser: the module whose weights are watched; ``None`` where it is not known yet.
        hidden: name of the argument with the latents.
        timesteps: names of the arguments with the noise level.
        say: called with a note for the report where calls have to be computed.
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
        self._step: dict[Any, tuple[str, Any, int | None]] = {}  # this step's calls by their arguments
        self._position = -1
        self._windows = False  # there are windows that cannot be told apart

    def begin(self) -> None:
        """A run begins."""
        self.end()
        self._weights = tuple(_state(self._denoiser))

    def found(self, denoiser: Any) -> None:
        """The denoiser is known now, before anything was filled."""
        self._denoiser = denoiser
        self._weights = tuple(_state(denoiser))

    def forget(self, branch: str) -> None:
        """Forget a branch, which is not called any more in this run."""
        self._seen.pop(branch, None)

    def look(self, branch: str, position: int, call: Mapping[str, Any], leaping: bool) -> str:
        """Take note of a call, and judge what is kept of its branch.

        Args:
            branch: guidance branch of the call.
            position: how many steps of the run the denoiser has seen before.
            call: arguments of the call by name.
            leaping: the solver goes beyond steps in this run, so that the same latents may come again.

        Returns:
            :data:`USABLE`, :data:`DOUBTFUL` or :data:`STALE`. It stays :data:`STALE` until :meth:`renewed` is called.
        """
        before = self._seen.get(branch)
        anew = before.anew if before is not None else set()
        left_out = anew if before is not None and before.calls >= JUDGED else set()
        given = {n: leaves(v) for n, v in call.items() if n not in self._apart and n not in left_out}
        arguments = {name: tuple([identity(leaf) for leaf in values]) for name, values in given.items()}
        latents = call.get(self._hidden)
        hidden: tuple[weakref.ref[Any], int | None] | None = None
        layout: tuple[Any, ...] = ()
        if isinstance(latents, torch.Tensor):
            hidden = weakref.ref(latents), version_of(latents)
            layout = (tuple(latents.shape), latents.dtype, latents.device, window_of(latents))
        held = [leaf for values in given.values() for leaf in values]
        self._look_beside(branch, position, arguments, latents)
        now = self._seen[branch] = _Seen(arguments, held, hidden, layout, position, anew)
        if before is None:
            return self._state(branch, False)
        now.calls = before.calls + 1
        if now.calls < JUDGED:
            now.older = before.arguments, before.held
        back: set[str] = set()
        if before.older is not None:  # what comes back was not made anew: two values take turns
            older, last = before.older[0], before.arguments
            back = {n for n in older if arguments.get(n) == older[n] != last.get(n)} & (anew | before.doubtful)
            anew = now.anew = anew - back
        changed = {n for n in {*arguments, *before.arguments} if arguments.get(n) != before.arguments.get(n)} - anew
        if now.calls == 2:
            now.doubtful, changed = changed, set()
        else:
            made = (before.doubtful & changed) - back
            now.anew = anew | made
            changed = (changed | before.doubtful) - made  # what did not change again had really changed before
        if layout != before.layout:
            changed.add(self._hidden)
        if changed:
            self._say(ARGUMENTS_NOTE.format(names=", ".join(sorted(changed))))
        same = position > before.position and not leaping and _one(hidden, before.hidden)
        if same:
            self._say(LATENTS_NOTE)
        if changed or same or position > before.position + 1:  # or it was not called at some step
            self._stale.add(branch)
        return self._state(branch, bool(now.doubtful))

    def _state(self, branch: str, doubt: bool) -> str:
        if branch in self._stale:
            return STALE
        return DOUBTFUL if doubt or self._windows else USABLE

    def _look_beside(self, branch: str, position: int, arguments: Mapping[str, Any], latents: Any) -> None:
        """Look for windows among this step's calls: unnamed calls that differ in their latents alone.

        Windows are told apart by their place in a larger tensor, if at all.
        """
        if position != self._position:
            self._position, self._step = position, {}
        if not branch.startswith("call ") or latents is None or not arguments:
            return
        try:
            other, theirs, place = self._step.setdefault(
                tuple(sorted(arguments.items())), (branch, latents, window_of(latents))
            )
        except TypeError:  # a value that is neither a tensor nor hashable
            return
        if other != branch and theirs is not latents and None in (place, window_of(latents)) and not self._windows:
            self._windows = True
            self._say(WINDOWS_NOTE)

    def renewed(self, branch: str) -> None:
        """Note that what was kept of a branch was dropped."""
        self._stale.discard(branch)

    def weights_changed(self) -> bool:
        """Whether the denoiser's weights have changed since this was last called, or since the run began."""
        before, self._weights = self._weights, tuple(_state(self._denoiser))
        if before == self._weights:
            return False
        self._say(WEIGHTS_NOTE)
        self._stale.update(self._seen)
        return True


def _one(new: tuple[Any, int | None] | None, old: tuple[Any, int | None] | None) -> bool:
    """Whether these are the same tensor, not written to in between; ``False`` if that cannot be told."""
    if new is None or old is None or new[1] is None:
        return False
    return new[0]() is old[0]() and new[1] == old[1]


def _state(denoiser: Any) -> Iterator[Any]:
    """Values that change when weights are written to, or when adapters are added, weighted, switched, fused or removed.

    Writing through ``.data`` changes none of them.
    """
    for module in denoiser.modules() if denoiser is not None else ():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield version_of(parameter)
        if "_active_adapter" in vars(module):  # a layer of peft
            yield repr([vars(module).get(name) for name in ADAPTER_ATTRIBUTES])
