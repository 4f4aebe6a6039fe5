"""One denoiser of a diffusers pipeline: our hooks on it, and the run that is under way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ...engine.arguments import named, parameters
from ...engine.clock import Clock, Tick
from ...engine.fills.inside import units_inside
from ...engine.fills.stack import Stack
from ...engine.measure import Probe
from ...engine.report import Generation
from ...engine.run import Parts, Run
from ...engine.solver.leap import Leaper
from ...errors import UnicpError
from ...policies.base import Decision
from ...policies.config import Config, make_policy
from ...specs import ModelSpec
from . import compiled, hooks, parallel

BLOCK_HOOK = "unicp_block"
UNIT_HOOK = "unicp_unit"


class HookedDenoiser:
    """A denoiser with our hooks on it, from ``accelerate`` to ``restore``.

    Args:
        denoiser: the transformer.
        name: how records call it.
        config: what to do.
        spec: its structure; ``None`` will do for configs that look at nothing inside.
        pipe: its pipeline, if there is one.
        opened: returns where records of a video go, given that this denoiser begins one.
        ended: called when this denoiser's run is over.
        group: processes over which the tokens are spread, where diffusers does not know of it.

    Attributes:
        run: the video that is under way here, if any.
    """

    def __init__(
        self,
        denoiser: Any,
        name: str,
        config: Config,
        spec: ModelSpec | None,
        pipe: Any,
        opened: Callable[[HookedDenoiser], Generation],
        ended: Callable[[], None],
        group: Any = None,
    ) -> None:
        self.denoiser, self.name, self.config, self.spec = denoiser, name, config, spec
        self.needs = make_policy(config).needs()
        self.clock = Clock.of(pipe, spec, weigh=self.needs.weights)
        self.leaper = Leaper(self.clock.scheduler, self.needs.leap)
        self.parts = Parts()
        self.run: Run | None = None
        self.hook = hooks.DenoiserHook(self.call, self.end, self)
        self._opened, self._ended, self._group = opened, ended, group
        self._parameters = parameters(denoiser)
        self._placed: list[hooks.Placed] = []  # on blocks and units
        try:
            self._install(pipe)
        except BaseException:
            self.remove()
            raise

    # -- installing and removing -----------------------------------------------------------------------------------

    def _install(self, pipe: Any) -> None:
        """Make the parts that runs look into, and place their acts on the modules."""
        parts, spec, needs, placed = self.parts, self.spec, self.needs, hooks.Placed
        if spec is not None and needs.metric is not None:
            parts.probe = Probe(self.denoiser, spec, needs, compiled.eagerly)
        if spec is not None and needs.units:
            measured = parts.probe.blocks if parts.probe is not None else ()
            profile = getattr(self.config, "profile", None)
            part = profile.opened(self.denoiser, self.name, pipe) if profile is not None else None
            parts.units = units_inside(self.config, needs, self.denoiser, spec, measured, part, compiled.eagerly)
        whole: Any = getattr(self.config, "stack", self.config)
        if getattr(whole, "profile", None) is not None:
            whole.profile.opened(self.denoiser, self.name, pipe)
            parts.book = whole.profile.book(whole)
        hooks.install(self.denoiser, self.hook, hooks.HOOK)
        if spec is not None and needs.keep == "stack":
            parts.stack = Stack(self.denoiser, spec, parts.probe.run if parts.probe is not None else None)
            self._placed += [placed(block, act, BLOCK_HOOK) for block, act in parts.stack.acts]
        blocks = parts.stack.blocks if parts.stack is not None else []
        for block in parts.probe.modules if parts.probe is not None else ():
            if block not in blocks:
                act = functools.partial(parts.probe.run, block)  # type: ignore[union-attr]
                self._placed.append(placed(block, act, BLOCK_HOOK, gate_only=True))
        if parts.units is not None:
            self._placed += [placed(unit, act, UNIT_HOOK, nested=True) for unit, act in parts.units.acts]
        self._place(compiled.how_compiled(self.denoiser, self.denoiser.forward))

    def _place(self, how: str) -> None:
        """Act by gates where the denoiser is compiled, by hooks where it is not: people compile before or after."""
        group = self._group or parallel.group_of(self.denoiser)
        if group is not None and how and self._placed:
            raise UnicpError(
                f"{type(self.denoiser).__name__} is context-parallel and compiled, and {self.config.method} decides on "
                "its blocks: do one of both, or use a ScheduleConfig, which decides on the whole only"
            )
        for placed in self._placed:
            placed.place(how)
        if self.parts.probe is not None:
            self.parts.probe.group = group
            self.parts.probe.place(bool(how))
        if self.parts.units is not None:
            self.parts.units.spread(group)

    def remove(self) -> None:
        """Take all hooks off again. Doing it twice, or after others took our place, does no harm."""
        self.end()
        for placed in self._placed:
            placed.remove()
        hooks.uninstall(self.denoiser, self.hook, hooks.HOOK)
        if self.parts.probe is not None:
            self.parts.probe.remove()
        self._placed, self.parts = [], Parts()

    # -- one call --------------------------------------------------------------------------------------------------

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the denoiser's forward."""
        call = named(self._parameters, args, kwargs)
        try:
            tick = self.clock.tick(self.hook.contexts.current, call)
            if tick.new_generation:
                self._place(compiled.how_compiled(self.denoiser, forward))
                tick = self._begin(tick, call)
            run, step = self.run, tick.step
            assert run is not None
            decision = run.decide(step, tick.branch)
            if decision.action == "leap" and not self.leaper.over(step.index):
                decision = Decision(action="compute")  # the scheduler did not go where it was to go
            if decision.runs:
                self.leaper.go(step.index, run.decision)
            if decision.place is not None:
                args, kwargs = self.clock.moved(step.index, decision.place, self._parameters, args, kwargs)
            hidden = call.get(self.spec.hidden) if self.spec is not None else None
            batch = hidden.shape[0] if hidden is not None else 1
            frames = self.spec.frames(self.denoiser, call) if self.spec is not None else 1
            return run.act(step, tick.branch, decision, lambda: forward(*args, **kwargs), batch, frames)
        except BaseException as error:
            self.end()  # whatever happened, the next call begins afresh
            if isinstance(error, compiled.Unsupported):
                raise compiled.refused(error, self.denoiser) from error
            raise

    def _begin(self, tick: Tick, call: Mapping[str, Any]) -> Tick:
        """A video begins with this call. Returns its step, told what the solver can do."""
        if self.run is not None:
            self.run.close()
            self.run = None  # it is over, also for the session, which has yet to report it
        generation = self._opened(self)
        self.run = Run(self.config, name=self.name, parts=self.parts, generation=generation)
        self.leaper.begin()
        if not self.leaper.active:
            return tick
        step = self.clock.leaps(self.clock.movable(call), self.leaper.starts, self.leaper.throughout)
        return dataclasses.replace(tick, step=step)

    def rest(self) -> None:
        """Another denoiser has taken over; see :meth:`Run.rest`."""
        if self.run is not None:
            self.run.rest()

    def end(self) -> None:
        """End the video that is under way here. The next call begins another."""
        self.leaper.end()
        run, self.run = self.run, None
        self.clock.reset()
        if run is not None:
            try:
                run.close()
            finally:
                self._ended()
