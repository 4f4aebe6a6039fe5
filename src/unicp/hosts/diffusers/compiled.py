"""Support for ``torch.compile``: our hooks stay outside compiled code, and what they call stays compiled.

Dynamo traces through hooks. A decision would become a guard, and each of a model's blocks would be compiled again, as
each has a hook of its own. So where a denoiser is compiled, whole or block by block, we do not hook ``forward`` but put
gates in front of the compiled code. All gates are of one class and hold nothing that dynamo looks at, so blocks still
share one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import UnicpError
from ...tensors import private
from ...tensors.private import COMPILED_CALL, COMPILED_ORIGINAL, call_of, set_eval_frame
from ...tensors.private import Unsupported as Unsupported

Act = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Resumed:
    """A forward that is called from outside compiled code, but runs compiled."""

    def __init__(self, forward: Callable[..., Any], compiler: Any) -> None:
        self.forward, self._compiler = forward, compiler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        set_eval_frame(self._compiler)
        try:
            return self.forward(*args, **kwargs)
        finally:
            set_eval_frame(None)


NOT_ONE_GRAPH = (
    "unicp decides at every step what is run, which cannot be part of one graph: compile without fullgraph=True, or "
    "the blocks alone with transformer.compile_repeated_blocks(fullgraph=True)"
)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return private.uncompiled(function, NOT_ONE_GRAPH)


@_uncompiled
def outside(act: Act, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``act(forward, args, kwargs)``: ``act`` uncompiled, ``forward`` compiled if the caller is."""
    compiler = set_eval_frame(None)
    if compiler is None:
        return act(forward, args, kwargs)
    try:
        return act(Resumed(forward, compiler), args, kwargs)
    finally:
        set_eval_frame(compiler)


class Gate:
    """Stands in front of a module's compiled code or, inside compiled code, in place of a module's forward."""

    def __init__(self, act: Act, module: Any, place: str) -> None:
        self._act, self.place = act, place
        self.before = module.__dict__.get(place)
        self.inner = getattr(module, place)

    @_uncompiled  # this method too, as dynamo would guard on whatever it reads of the instance
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return outside(self._act, self.inner, args, kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UnicpError("an accelerated model cannot be copied: unicp.restore(...) it, copy it, accelerate both")


def place_of(module: Any, whole: bool) -> str:
    """The attribute in which a gate has to stand. Compiled code ignores what its parts were compiled to by themselves.

    Args:
        module: the module.
        whole: whether compiled code runs it.
    """
    return COMPILED_CALL if module.__dict__.get(COMPILED_CALL) is not None and not whole else "forward"


def put(module: Any, act: Act, whole: bool) -> Gate:
    """Put a gate in front of a module; ``whole`` if compiled code runs it."""
    gate = Gate(act, module, place_of(module, whole))
    module.__dict__[gate.place] = gate
    return gate


def stands(module: Any, gate: Gate, whole: bool) -> bool:
    """Whether a gate is where it should be: the module may have been compiled since, or compiled anew."""
    return gate.place == place_of(module, whole) and module.__dict__.get(gate.place) is gate


def take(module: Any, gate: Gate) -> None:
    """Take a gate away again. If other code holds on to it by now, the gate only passes calls through from here on."""
    if module.__dict__.get(gate.place) is not gate:
        gate._act = pass_through
    elif gate.before is None:
        del module.__dict__[gate.place]
    else:
        module.__dict__[gate.place] = gate.before


def pass_through(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An :data:`Act` that changes nothing, for hooks and gates that stay because other code holds on to them."""
    return forward(*args, **kwargs)


def how_compiled(denoiser: Any, forward: Callable[..., Any]) -> str:
    """How a denoiser that is called with this ``forward`` is compiled: ``"whole"``, in ``"parts"`` or not (``""``)."""
    if isinstance(forward, Resumed):
        return "whole"
    return "parts" if any(module.__dict__.get(COMPILED_CALL) is not None for module in denoiser.modules()) else ""


def original(module: Any) -> Any:
    """The module that ``torch.compile`` has wrapped; a module that is not wrapped, itself."""
    return getattr(module, COMPILED_ORIGINAL, module)


def eagerly(forward: Callable[..., Any], module: Any) -> Callable[..., Any]:
    """A function that runs a module uncompiled, hooks on its parts included.

    Args:
        forward: the function that would run it.
        module: the module.
    """
    while isinstance(forward, Resumed):
        forward = forward.forward
    gate = module.__dict__.get(COMPILED_CALL)
    return call_of(module) if isinstance(gate, Gate) and gate.inner is forward else forward


def uncompiled() -> Any:
    """A context in which no compiled code runs. What was compiled stays compiled."""
    return torch.compiler.set_stance("force_eager")


def refused(error: Unsupported, module: Any) -> UnicpError:
    """The error for a module that was compiled as one graph, though a method has to look into it."""
    return UnicpError(
        f"{type(module).__name__} was compiled with fullgraph=True, and this method decides on parts of it at every "
        "step; compile without fullgraph=True, or use a method that passes over whole steps"
    )
