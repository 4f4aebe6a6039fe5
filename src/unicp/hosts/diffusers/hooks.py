"""Our hooks, built on ``diffusers.hooks``: they are registered on instances and can be removed in any order.

``HookRegistry.remove_hook`` is correct only for the hook that was registered last: where the next outer hook replaces
the forward, it overwrites that replacement and thereby switches the outer hook off. This module mends both directions:
others may remove their hooks under ours, and we may remove ours under theirs.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import HookFunctionReference, StateManager

from ...errors import UnicpError
from ...tensors import private
from . import compiled

DENOISER_HOOK = "unicp"
"""Name of the hook on a whole denoiser."""


class ContextReceiver(StateManager):
    """Receives the cache context that a pipeline sets, separately for each thread; it holds no other state."""

    def __init__(self) -> None:
        super().__init__(None)
        self._of_thread = threading.local()

    @property
    def current(self) -> Any:
        """The context of this thread."""
        return getattr(self._of_thread, "context", None)

    def set_context(self, context: Any) -> None:
        self._of_thread.context = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self.set_context(None)


class _GuardedReference(HookFunctionReference):
    """Keeps our forward when diffusers relinks ``forward`` after removing an inner hook: only the inner one changes."""

    def __init__(self, replacement: Callable[..., Any], inner: Callable[..., Any]) -> None:
        super().__init__()
        self._replacement = replacement
        self.original_forward = inner

    @property
    def forward(self) -> Any:
        return self.__dict__.get("_replacement")

    @forward.setter
    def forward(self, inner: Any) -> None:
        self.original_forward = inner


class ReplacingHook(ModelHook):
    """A hook whose ``act(forward, args, kwargs)`` decides whether the module's forward runs."""

    def __init__(self, act: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.act = act
        self.installed: Any = None

    def __deepcopy__(self, memo: Any) -> Any:
        # A copy would decide for the original.
        raise UnicpError("an accelerated model cannot be copied: unicp.restore(...) it, copy it, accelerate both")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnicpError("an accelerated model cannot be pickled: unicp.restore(...) it before")

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return compiled.outside(self.act, self.fn_ref.original_forward, args, kwargs)


class DenoiserHook(ReplacingHook):
    """The hook on a whole denoiser: it also receives cache contexts and diffusers' own resets."""

    _is_stateful = True

    def __init__(self, act: Callable[..., Any], reset: Callable[[], None], owner: Any) -> None:
        super().__init__(act)
        self.contexts = ContextReceiver()
        self.reset = reset
        self.owner = owner

    def reset_state(self, module: Any) -> Any:
        self.reset()
        return module


def install(module: Any, hook: ReplacingHook, name: str, part: bool = False) -> None:
    """Register a hook on a module instance.

    On a ``part`` of a denoiser, it goes inside the hooks with which diffusers divides hidden states among processes and
    collects them again: those have to run whether the part runs or not.

    If an accelerate hook is outermost (CPU offload), ours goes inside it: accelerate removes its hook by putting back
    the forward it found, and offloading a model does so after every run.
    """
    registry = HookRegistry.check_if_exists_or_initialize(module)
    around = module.__dict__.get("forward")
    if getattr(getattr(around, "func", None), "__module__", None) != "accelerate.hooks":
        around = None
    if around is not None:
        module.forward = getattr(module, private.FORWARD_BELOW)
    spreading = [n for n in private.hook_order(registry) if n.startswith(("cp_input", "cp_output"))] if part else []
    others = {name: registry.hooks[name] for name in spreading}
    for other in reversed(spreading):
        registry.remove_hook(other, recurse=False)
    registry.register_hook(hook, name)
    plain = hook.fn_ref
    guarded = _GuardedReference(plain.forward, plain.original_forward)
    guarded.pre_forward, guarded.post_forward = plain.pre_forward, plain.post_forward
    # The closure that diffusers built holds the plain reference: give that very object the guarded behaviour.
    state = dict(guarded.__dict__)
    plain.__class__ = _GuardedReference
    plain.__dict__.clear()
    plain.__dict__.update(state)
    hook.installed = module.forward
    for other, theirs in others.items():
        registry.register_hook(theirs, other)
    if around is not None:
        setattr(module, private.FORWARD_BELOW, module.forward)
        module.forward = around
    _forget_children(registry)


def replaced(module: Any, hook: ReplacingHook) -> bool:
    """Whether a module's ``forward`` was replaced since by code that, as far as can be told, does not call the hook."""
    forward = vars(module).get("forward")
    while forward is not None:
        home = getattr(getattr(forward, "func", None), "__module__", None) or ""
        if forward is hook.installed or home.startswith(("accelerate.hooks", "diffusers.hooks")):
            return False
        forward = getattr(forward, "__wrapped__", None)
    return True


def find(module: Any, name: str) -> Any:
    """The hook of this name on a module, or ``None``."""
    registry = getattr(module, private.HOOK_REGISTRY, None)
    return registry.get_hook(name) if registry is not None else None


def uninstall(module: Any, hook: ReplacingHook, name: str) -> None:
    """Remove a hook of ours completely, wherever it stands among others.

    Nothing happens if the hook is no longer there, or if another hook has its name by now.
    """
    registry = getattr(module, private.HOOK_REGISTRY, None)
    if registry is None or registry.hooks.get(name) is not hook:
        return
    index = private.hook_order(registry).index(name)
    inner = private.hook_references(registry)[index].original_forward
    outer = private.hook_references(registry)[index + 1] if index + 1 < len(private.hook_references(registry)) else None
    if module.__dict__.get("forward") is hook.installed:
        module.forward = inner
    elif module.__dict__.get(private.FORWARD_BELOW) is hook.installed:  # an accelerate hook stands around ours
        setattr(module, private.FORWARD_BELOW, inner)
    elif outer is not None and outer.original_forward is hook.installed:
        outer.original_forward = inner
    elif outer is not None and outer.forward is hook.installed:
        outer.forward = inner
    else:  # other code holds on to our forward: from now on it only passes calls through
        hook.act = compiled.pass_through
    del registry.hooks[name]
    private.hook_order(registry).pop(index)
    private.hook_references(registry).pop(index)
    _forget_children(registry)
    if not registry.hooks:
        delattr(module, private.HOOK_REGISTRY)
        own = module.__dict__.get("forward")
        if inspect.ismethod(own) and own.__func__ is getattr(type(module), "forward", None):
            del module.__dict__["forward"]


class Placed:
    """An act placed on a module: through a hook on its forward, or through a gate where the denoiser is compiled.

    Args:
        module: the module.
        act: called in place of the module's forward.
        name: name of the hook.
        nested: whether the module is inside a block, and so in compiled code even where blocks are compiled one by one.
        gate_only: whether nothing is placed while the denoiser is not compiled.
    """

    def __init__(
        self, module: Any, act: compiled.Act, name: str, *, nested: bool = False, gate_only: bool = False
    ) -> None:
        self.module = module
        self._act, self._name, self._nested, self._gate_only = act, name, nested, gate_only
        self._hook: ReplacingHook | None = None
        self._gate: compiled.Gate | None = None

    def place(self, how: str) -> None:
        """Put the act where it belongs, given how the denoiser is compiled (:func:`compiled.how_compiled`)."""
        if how:
            whole = self._nested or how == "whole"
            if self._gate is None or not compiled.stands(self.module, self._gate, whole):
                self.remove()
                self._gate = compiled.put(self.module, self._act, whole)
        elif self._hook is None:
            self.remove()
            if not self._gate_only:
                self._hook = ReplacingHook(self._act)
                install(self.module, self._hook, self._name, part=True)

    def remove(self) -> None:
        """Take it off again. Doing it twice does no harm."""
        if self._gate is not None:
            compiled.take(self.module, self._gate)
        if self._hook is not None:
            uninstall(self.module, self._hook, self._name)
        self._gate = self._hook = None


def _forget_children(registry: HookRegistry) -> None:
    # Since diffusers 0.41 a registry caches its children's registries at the first cache_context.
    if hasattr(registry, "invalidate_child_registries_cache"):
        registry.invalidate_child_registries_cache()
