"""One denoiser of a diffusers pipeline, with our hooks on it and the run that is under way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ...engine.arguments import named, parameters
from ...engine.clock import Clock, Tick
from ...engine.fills.inside import units_inside
from ...engine.fills.stack import Stack
from ...engine.measure import Probe
from ...engine.meter import Meter
from ...engine.report import Generation
from ...engine.run import Parts, Run
from ...engine.sampling import not_sampling
from ...engine.solver.leap import Leaper
from ...engine.solver.timesteps import keep_on_host, leave
from ...engine.sources import STALE, USABLE, Sources
from ...engine.turns import Turns
from ...errors import UnicpError, UnicpWarning
from ...policies.base import Decision
from ...policies.config import Config, make_policy
from ...specs import TIMESTEPS, ModelSpec
from . import compiled, hooks, parallel

BLOCK_HOOK = "unicp_block"
UNIT_HOOK = "unicp_unit"

COPIES_NOTE = (
    "the pipeline takes its steps with copies of its scheduler, which cannot be shown longer steps: skipped steps are "
    "forecast"
)
STRAY_CALLS_NOTE = (
    "calls of another video came in the middle of this one, and were computed: of several videos at a time on one "
    "model, one is accelerated"
)
LEAPS_NOTE = (
    "the solver took longer steps, so latents taken out in the middle of the run belong to a later step (leap=0.0 "
    "takes every step)"
)
NOISE_NOTE = "this sampler draws noise at its steps, which outputs follow: they were repeated instead of forecast"


def sound(
    run: Run, tick: Tick, decision: Decision, sources: Sources, call: Mapping[str, Any], leaper: Leaper | None
) -> Decision:
    """What was decided on a call, if what is kept may stand in for what it skips; else to compute the call.

    Args:
        run: asked before, with :meth:`Run.decide`.
        tick: place of the call.
        decision: what the run decided.
        sources: of the denoiser.
        call: arguments by name.
        leaper: of the scheduler, if the run follows it.
    """
    branch, step = tick.branch, tick.step
    if tick.unknown:
        run.remark(tick.unknown)
    if not decision.serves and not run.keeps(branch):
        return decision  # nothing is kept that could be judged, and nothing will be
    state = sources.look(branch, step.position, call, leaper is not None and leaper.active)
    state = STALE if tick.unknown else state
    noisy = step.noisy or (leaper is not None and leaper.noisy)
    if decision.action == "leap":
        if leaper is not None and leaper.over(step.index):  # the solver ignores what this call returns
            run.remark(LEAPS_NOTE)
            return decision
        if not noisy:
            return run.instead()  # the scheduler did not go where it was told to go
        decision = dataclasses.replace(decision, action="forecast")
    filling = decision.action != "compute"
    if (filling or run.corrects(branch)) and sources.weights_changed():
        state = STALE
    if state == STALE:
        run.drop(branch)
        sources.renewed(branch)
    if state != USABLE and filling:
        return run.instead()
    if decision.action == "forecast" and noisy:
        run.remark(NOISE_NOTE)
        return dataclasses.replace(decision, action="reuse")
    return decision


class HookedDenoiser:
    """A denoiser with our hooks on it, from ``accelerate`` to ``restore``.

    Args:
        denoiser: the transformer.
        name: its name in records.
        config: the method, with profiles read.
        spec: its structure; may be ``None`` for configs that look at nothing inside.
        pipe: its pipeline, if there is one.
        opened: called when this denoiser begins a video; returns where the records go.
        ended: called when this denoiser's run is over.
        group: processes among which the tokens are divided, where diffusers does not know of it.
        plans: of a host that checks the config's profile itself: returns the plans of it, asked as each video begins.

    Attributes:
        run: the video that is under way here, if any.
        left: what other denoisers kept as this one took over, by branch.
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
        plans: Callable[[], Any] | None = None,
    ) -> None:
        self.denoiser, self.name, self.config, self.spec = denoiser, name, config, spec
        self.needs = make_policy(config).needs()
        self._make_clock = functools.partial(
            Clock.of, pipe, spec, weigh=self.needs.weights, forecasts=self.needs.order > 0
        )
        self.clock = self._make_clock()
        self.turns = Turns(self.is_over, self.end)  # a session sets its own
        self.leaper = Leaper(self.clock.scheduler, self.needs.leap)
        self.parts = Parts()
        self.run: Run | None = None
        self.left: dict[str, Any] = {}
        self.hook = hooks.DenoiserHook(self.call, self._reset, self)
        self._opened, self._ended, self._group, self._plans = opened, ended, group, plans
        self._parameters = parameters(denoiser)
        hidden = spec.hidden if spec is not None else next(iter(self._parameters), "")
        times = {spec.timestep} if spec is not None else set(TIMESTEPS)
        self.sources = Sources(denoiser, hidden, sorted(times), self._remark)
        self._warned: set[str] = set()
        self._plain = ""  # why calls since the last video ran the plain model
        self._forward: Any = None  # the denoiser's as that video began
        self._follows_scheduler = False  # the run in progress is of the pipeline's scheduler
        self._placed: list[hooks.Placed] = []  # on blocks and units
        try:
            self._install(pipe)
        except AttributeError as error:
            self.remove()
            family = spec.family if spec is not None else ""
            raise UnicpError(
                f"this {type(denoiser).__name__} is not built as the spec of the family {family!r} says: {error}; pass "
                "a fitting spec= to accelerate, or use a ScheduleConfig, which needs none"
            ) from error
        except BaseException:
            self.remove()
            raise

    def _remark(self, note: str) -> None:
        """Note something in the report of the video in progress, once."""
        if self.run is not None:
            self.run.remark(note)

    # -- installing and removing -----------------------------------------------------------------------------------

    def _install(self, pipe: Any) -> None:
        """Make the parts that runs look into, and put our hooks on the modules."""
        parts, spec, needs, placed = self.parts, self.spec, self.needs, hooks.Placed
        parts.meter = Meter(self.denoiser, spec)
        if spec is not None and needs.metric is not None:
            parts.probe = Probe(self.denoiser, spec, needs, compiled.eagerly)
            parts.probe.here = lambda: self.turns.here()  # a session sets its own
        if spec is not None and needs.units:
            measured = parts.probe.blocks if parts.probe is not None else ()
            profile = getattr(self.config, "profile", None)
            part = profile.opened(self.denoiser, self.name, pipe) if profile is not None else None
            parts.units = units_inside(self.config, needs, self.denoiser, spec, measured, part, compiled.eagerly)
            parts.units.way = parts.meter.way
        whole: Any = getattr(self.config, "stack", self.config)
        if getattr(whole, "profile", None) is not None and self._plans is None:
            whole.profile.opened(self.denoiser, self.name, pipe)
            parts.book = whole.profile.book(whole)
        keep_on_host(self.clock.scheduler(), self)
        hooks.install(self.denoiser, self.hook, hooks.DENOISER_HOOK)
        if spec is not None and needs.keep == "stack":
            watched = (parts.probe.modules, parts.probe.run) if parts.probe is not None else ()
            parts.stack = Stack(self.denoiser, spec, *watched)
            self._placed += [placed(block, self._in_turn(act), BLOCK_HOOK) for block, act in parts.stack.acts]
        blocks = parts.stack.blocks if parts.stack is not None else []
        for block in parts.probe.modules if parts.probe is not None else ():
            if block not in blocks:
                act = functools.partial(parts.probe.run, block)  # type: ignore[union-attr]
                self._placed.append(placed(block, self._in_turn(act), BLOCK_HOOK, gate_only=True))
        if parts.units is not None:
            self._placed += [placed(unit, self._in_turn(act), UNIT_HOOK, nested=True) for unit, act in parts.units.acts]
        self._place(compiled.how_compiled(self.denoiser, self.denoiser.forward))

    def _in_turn(self, act: compiled.Act) -> compiled.Act:
        """A module's ``act`` for the thread whose turn it is; calls from other threads pass through."""

        def acts(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return act(forward, args, kwargs) if self.turns.here() else forward(*args, **kwargs)

        return acts

    def _place(self, how: str) -> None:
        """Act through gates if the denoiser is compiled, else through hooks; people compile before or after.

        Args:
            how: see :func:`compiled.how_compiled`.

        Raises:
            UnicpError: the denoiser is compiled and context-parallel, and the method acts on its blocks.
        """
        group = self._group or parallel.group_of(self.denoiser)
        self.parts.shards = (self._group or parallel.shards_of(self.denoiser)) if self.needs.check else None
        if group is not None and how and self._placed:
            raise UnicpError(
                f"{type(self.denoiser).__name__} is context-parallel and compiled, and {self.config.method} decides on "
                "its blocks: do one of both, or use a ScheduleConfig, which decides on the whole only"
            )
        self.parts.meter.around = compiled.uncompiled if how else contextlib.nullcontext
        for placed in self._placed:
            placed.place(how)
        if self.parts.probe is not None:
            self.parts.probe.group = group
            self.parts.probe.place(bool(how))
        if self.parts.units is not None:
            self.parts.units.spread(group)

    def remove(self) -> None:
        """Take all hooks off again. It does no harm to do it twice, or after other code has replaced our hooks."""
        self.end()
        leave(self)
        for placed in self._placed:
            placed.remove()
        hooks.uninstall(self.denoiser, self.hook, hooks.DENOISER_HOOK)
        if self.parts.probe is not None:
            self.parts.probe.remove()
        self._placed, self.parts = [], Parts()

    # -- one call --------------------------------------------------------------------------------------------------

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the denoiser's forward."""
        call = named(self._parameters, args, kwargs)
        why = not_sampling(self.denoiser, call)
        if why:
            return self._run_plain(why, forward, args, kwargs)
        if not self.turns.take(self.name, self._make_clock, self.hook.contexts.current, call):
            self._remark(STRAY_CALLS_NOTE)
            return forward(*args, **kwargs)
        try:
            tick = self.clock.tick(self.hook.contexts.current, call)
            if tick.stray:
                self._remark(STRAY_CALLS_NOTE)
                return forward(*args, **kwargs)
            if tick.new_generation:
                self._place(compiled.how_compiled(self.denoiser, forward))
                tick = self._begin(tick, call)
            elif tick.step.position == 1 and self.leaper.is_passed_by():
                self._remark(COPIES_NOTE)
                tick = dataclasses.replace(tick, step=self.clock.forbid_leaps())
            run, step = self.run, tick.step
            assert run is not None
            decided = run.decide(step, tick.branch)
            leaper = self.leaper if self._follows_scheduler else None
            decision = sound(run, tick, decided, self.sources, call, leaper)
            if decided.runs and self._follows_scheduler:
                self.leaper.go(step.index, run.decision)
            if decision.place is not None:
                args, kwargs = self.clock.move_timestep(step.index, decision.place, self._parameters, args, kwargs)
            hidden = call.get(self.spec.hidden) if self.spec is not None else None
            batch = hidden.shape[0] if hidden is not None else 1
            frames = self.spec.frames(self.denoiser, call) if self.spec is not None else 1
            self.parts.meter.begin(tick.branch, call)

            def compute() -> Any:
                run_it = compiled.eagerly(forward, self.denoiser) if self.parts.meter.counting else forward
                return run_it(*args, **kwargs)

            output = run.act(step, tick.branch, decision, compute, batch, frames)
            if step.is_last(1):
                self.sources.forget(tick.branch)
            return output
        except BaseException as error:
            self.end()  # whatever happened, the next call begins a new video
            if isinstance(error, compiled.Unsupported):
                raise compiled.refused(error, self.denoiser) from error
            raise
        finally:
            self.turns.done()

    def _begin(self, tick: Tick, call: Mapping[str, Any]) -> Tick:
        """Begin a video with this call. Returns the tick, whose step now says what the solver can do."""
        if self.run is not None:
            self.run.close()
            self.run = None  # the session, which has yet to report it, sees that it is over
        if self._plans is not None:
            self.parts.book = self._plans()
        generation = self._opened(self)
        keep_on_host(self.clock.scheduler(), self)  # it may be another one by now
        self._plain, self._forward = "", vars(self.denoiser).get("forward")
        self.run = Run(self.config, name=self.name, parts=self.parts, generation=generation)
        self.sources.begin()
        self._follows_scheduler = self.clock.follows_scheduler and not self.clock.in_waves
        left, self.left = self.left, {}
        if self._follows_scheduler:
            self.leaper.begin(tick.step.index)
            if self.leaper.active and self.leaper.over(tick.step.index):
                self.run.borrow(left)
        if not self._follows_scheduler or not self.leaper.active:
            return tick
        step = self.clock.allow_leaps(free=self.clock.can_move_timestep(call), **self.leaper.worth)
        return dataclasses.replace(tick, step=step)

    def _run_plain(self, why: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the plain model, and say so once."""
        self._remark(why)
        if self.is_over():
            self._plain = why
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"{self.config.method}: {why}", UnicpWarning, stacklevel=2)
        return forward(*args, **kwargs)

    def passed_by(self) -> str:
        """Why videos may have been made since the last one here without us; empty if none can have been."""
        here = vars(self.denoiser).get("forward")
        if here is not self._forward and hooks.replaced(self.denoiser, self.hook):
            return (
                f"forward of {self.name} was replaced since, and may not call what was there before; accelerate after "
                "others have put theirs on"
            )
        return self._plain

    def is_over(self) -> bool:
        """Whether the video in progress had its last call."""
        run = self.run
        return run is None or (run.generation.complete and self.clock.steps_known and not run.tensors())

    def _reset(self) -> None:
        """End the video in progress as the pipeline asks to, unless it is that of another thread."""
        self.turns.in_turn(self.end)

    def rest(self) -> dict[str, Any]:
        """Keep nothing any more, as another denoiser has taken over; see :meth:`Run.rest`."""
        return self.run.rest() if self.run is not None else {}

    def end(self) -> None:
        """End the video that is under way here. The next call begins another."""
        self.leaper.end()
        run, self.run = self.run, None
        self.clock.reset()
        self.sources.end()
        if run is not None:
            try:
                run.close()
            finally:
                self._ended()
