"""Acts decisions out on one denoiser: runs it, or fills what a policy says is not worth running."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import UnicpError
from ..hosts.diffusers import compiled, hooks, parallel
from ..policies import Config, Plan, Policy, Step, make_policy
from ..specs import BlockList, ModelSpec
from ..tensors.layout import relayout
from .clock import Clock, Tick
from .fills.branch_cache import BranchCache, check_streams, leading, residuals, shape_of
from .fills.inside import Inside, plan_book
from .measure import Probe, forecast_error
from .report import Generation, StepRecord
from .solver.leap import Leaper

HOOK = "unicp"
BLOCK_HOOK = "unicp_block"

Forward = Callable[..., Any]


@dataclass
class Call:
    """A denoiser call in progress."""

    tick: Tick
    plan: Plan
    cache: BranchCache
    batch: int
    frames: int
    entry: list[Any] = field(default_factory=list)  # the streams as they enter the first block


class Executor:
    """Everything of ours on one denoiser: its hooks, its clock, its policies, what is kept.

    Args:
        denoiser: the transformer.
        name: how records call it.
        config: what to do.
        spec: its structure; ``None`` will do for configs that look at nothing inside.
        generation: returns where records of a generation go, given whether this denoiser begins a new one.
        ended: called when a generation of this denoiser is over.
        group: processes over which the tokens are spread, where diffusers does not know of it.
    """

    def __init__(
        self,
        denoiser: Any,
        name: str,
        config: Config,
        spec: ModelSpec | None,
        pipe: Any,
        generation: Callable[[Executor], Generation],
        ended: Callable[[], None],
        group: Any = None,
    ) -> None:
        self.denoiser = denoiser
        self.name = name
        self.config = config
        self.needs = make_policy(config).needs()
        self.spec = spec
        self.clock = Clock.of(pipe, spec, weigh=self.needs.correct)
        self._open = generation
        self._ended = ended
        self._group = group
        self.generation: Generation | None = None
        self.policies: dict[str, Policy] = {}
        self._plans: dict[str, Plan] = {}
        self._caches: dict[str, BranchCache] = {}
        self._pending: list[tuple[Policy, Step, StepRecord, Any, dict[str, tuple[int, Any]]]] = []
        self._call: Call | None = None
        self._idle = ""
        self.said: list[str] = []
        self._parameters = hooks.parameters(denoiser)
        self.hook = hooks.DenoiserHook(self.call, self.end, self)
        self._placed: list[hooks.Placed] = []  # on blocks
        self._blocks: list[Any] = []
        self._layouts: list[BlockList] = []
        self._probe: Probe | None = None
        self.inside: Inside | None = None
        self.book: Any = None
        self.leaper = Leaper(self.clock.scheduler, self._ahead if self.needs.leap else None)
        try:
            self._install(pipe)
        except BaseException:
            self.remove()
            raise

    # -- installing and removing -----------------------------------------------------------------------------------

    def _install(self, pipe: Any) -> None:
        if self.spec is not None and self.needs.metric is not None:
            self._probe = Probe(self.denoiser, self.spec, self.needs)
        if self.spec is not None and self.needs.units:
            measured = self._probe.blocks if self._probe is not None else ()
            self.inside = Inside(self.config, self.needs, self.denoiser, self.name, self.spec, measured, pipe)
        whole = getattr(self.config, "stack", self.config)
        if getattr(whole, "profile", None) is not None:
            self.book = plan_book(whole, self.denoiser, self.name, pipe)
        hooks.install(self.denoiser, self.hook, HOOK)
        if self.spec is not None and self.needs.keep == "stack":
            for position, (name, block, described) in enumerate(self.spec.stack(self.denoiser)):
                self._blocks.append(block)
                self._layouts.append(described)
                act = self._block_act(position, name, block, described)
                self._placed.append(hooks.Placed(block, act, BLOCK_HOOK))
        for block in self._probe.modules if self._probe is not None else ():
            if block not in self._blocks:
                act = functools.partial(self._probe.run, block)  # type: ignore[union-attr]
                self._placed.append(hooks.Placed(block, act, BLOCK_HOOK, gate_only=True))
        self._place(compiled.how_compiled(self.denoiser, self.denoiser.forward))

    def _place(self, how: str) -> None:
        """Act by gates where the denoiser is compiled, by hooks where it is not: people compile before or after."""
        group = self._group or parallel.group_of(self.denoiser)
        if group is not None and how and (self._placed or self.inside is not None):
            raise UnicpError(
                f"{type(self.denoiser).__name__} is context-parallel and compiled, and {self.config.method} decides on "
                "its blocks: do one of both, or use a ScheduleConfig, which decides on the whole only"
            )
        for placed in self._placed:
            placed.place(how)
        if self._probe is not None:
            self._probe.group = group
            self._probe.place(bool(how))
        if self.inside is not None:
            self.inside.spread(group)
            self.inside.units.place(how)

    def remove(self) -> None:
        """Take all hooks off again. Doing it twice, or after others took our place, does no harm."""
        self.end()
        for placed in self._placed:
            placed.remove()
        hooks.uninstall(self.denoiser, self.hook, HOOK)
        if self._probe is not None:
            self._probe.remove()
        if self.inside is not None:
            self.inside.units.remove()
        self._placed, self._blocks, self._layouts = [], [], []

    # -- one call --------------------------------------------------------------------------------------------------

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the denoiser's forward."""
        began = time.perf_counter()
        named = hooks.named(self._parameters, args, kwargs)
        try:
            tick = self.clock.tick(self.hook.contexts.current, named)
            if tick.new_generation:
                self._place(compiled.how_compiled(self.denoiser, forward))
                self._begin()
                tick = self._told(tick, named)
            key = tick.branch if self.needs.separate else ""
            plan, deciding = self._decide(tick, key)
            output = self._act(tick, plan, deciding, key, forward, args, kwargs, named, began)
        except BaseException as error:
            # Whatever happened, the next call begins afresh.
            self._call = None
            self.end()
            if isinstance(error, compiled.Unsupported):
                raise compiled.refused(error, self.denoiser) from error
            raise
        if tick.step.is_last(1):
            # Nothing comes after the last step: free at once what this branch kept.
            self._caches.pop(tick.branch, None)
            if self._probe is not None:
                self._probe.forget(key)
            if self.inside is not None:
                self.inside.units.forget(tick.branch)
        return output

    def _begin(self) -> None:
        self.settle()
        self._clear()
        self.generation = None  # the old one is over, also for the session, which has yet to report it
        self.generation = self._open(self)
        self.leaper.begin()

    def _told(self, tick: Tick, named: Mapping[str, Any]) -> Tick:
        """The first call of a run, told what the solver can do."""
        if not self.leaper.active:
            return tick
        step = self.clock.leaps(self.clock.movable(named), self.leaper.starts, self.leaper.throughout)
        return dataclasses.replace(tick, step=step)

    def _decide(self, tick: Tick, key: str) -> tuple[Plan, bool]:
        """The plan for this call, and whether this call is the one that measures."""
        if tick.new_step:
            self.settle()
            self._plans.clear()
        deciding = key not in self._plans
        if deciding:
            if key not in self.policies:
                self.policies[key] = policy = make_policy(self.config)
                if self.inside is not None:
                    self.inside.introduce(policy, self.book)
                else:
                    (policy.inner or policy).attach({}, (), self.book)
            self._plans[key] = self.policies[key].plan(tick.step)
        plan = self._plans[key].of_branch(tick.branch)
        cache = self._caches.get(tick.branch)
        if not plan.runs and (cache is None or not (cache.residuals or cache.outputs)):
            plan = Plan(action="compute")  # a branch that was never computed has nothing to be filled from
        return plan, deciding

    def _act(
        self,
        tick: Tick,
        plan: Plan,
        deciding: bool,
        key: str,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        named: Mapping[str, Any],
        began: float,
    ) -> Any:
        cache, step = self._caches.setdefault(tick.branch, BranchCache()), tick.step
        record = StepRecord(
            index=step.index, sigma=step.sigma, branch=tick.branch, action=plan.action, denoiser=self.name
        )
        if not plan.runs and self.leaper.over(step.index):
            output, record.action = cache.filled_output(step, plan, self.needs)[0], "leap"
        elif not plan.runs and self.needs.keep == "output":
            weight = self.leaper.weight(step, self._plans[key])
            output, record.action = cache.filled_output(step, plan, self.needs, weight)
        else:
            hidden = named.get(self.spec.hidden) if self.spec else None
            batch = hidden.shape[0] if hidden is not None else 1
            frames = self.spec.frames(self.denoiser, named) if self.spec else 1
            self._call = Call(tick, plan, cache, batch, frames)
            measuring = deciding and plan.runs
            if self._probe is not None:
                self._probe.armed = measuring
            if self.inside is not None and plan.runs:
                self.inside.begin(tick, plan, batch, measuring)
            if plan.place is not None:
                args, kwargs = self.clock.moved(step.index, plan.place, self._parameters, args, kwargs)
                record.sigma = self.clock.sigma_at(plan.place)
            output = forward(*args, **kwargs)
            self._call = None
            changes = self.inside.finish(record) if self.inside is not None and plan.runs else {}
            scalars = None
            if measuring and self._probe is not None:
                scalars = self._probe.compare(key, batch, frames)
            elif measuring and self.needs.check:
                scalars = forecast_error(leading(output), cache.leading(), cache.sigmas, tick.step.sigma)
            if plan.runs and self.needs.keep == "output":
                output = cache.take(step, output, self.needs)
            if measuring:
                self._pending.append((self.policies[key], tick.step, record, scalars, changes))
        assert self.generation is not None
        self.generation.add(record, self._fraction(record), began)
        self.generation.complete |= tick.step.count is None or tick.step.is_last(1)
        if plan.runs:
            self.generation.hold(self.name, self.tensors())
            if self.inside is not None:
                self.generation.sliced(self.name, self.inside.units.slice_tensors())
        return output

    def settle(self) -> None:
        """Hand the last step's measurements to its policies and records: the one transfer from the device."""
        pending, self._pending = self._pending, []
        for policy, step, record, scalars, changes in pending:
            named = {name: change for name, (_, change) in changes.items() if change is not None}
            together = ([] if scalars is None else [scalars]) + [change.reshape(1) for change in named.values()]
            values = [None if value != value else value for value in torch.cat(together).tolist()] if together else []
            if scalars is not None:
                record.metric, record.motion = values[:2]
                values = values[2:]
            policy.observe(step, record.metric, record.motion)
            measured = dict(zip(named, values, strict=True))
            policy.observe_units(step, {name: (age, measured.get(name)) for name, (age, _) in changes.items()})

    def _ahead(self, index: int) -> tuple[float, ...] | None:
        """Where the solver goes from a step that was just computed."""
        self.settle()  # the policy may doubt its plan by what this step measured
        step, policy = self.clock.step, self.policies.get("")
        return policy.leap(step) if policy is not None and step is not None and step.index == index else None

    # -- filling ---------------------------------------------------------------------------------------------------

    def _block_act(self, position: int, name: str, block: Any, described: BlockList) -> Callable[..., Any]:
        streams, names = described.streams, hooks.parameters(block)
        missing = [stream for stream in streams if stream not in names]
        if missing:
            raise UnicpError(f"blocks of {described.path!r} take no argument {missing[0]!r}; they take: {names}")
        places = [names.index(stream) for stream in streams]

        def act(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._call
            if call is None:
                return forward(*args, **kwargs)
            values = [
                args[place] if place < len(args) else kwargs.get(stream)
                for place, stream in zip(places, streams, strict=True)
            ]
            if position == 0:
                call.entry = values
            last = position == len(self._blocks) - 1
            if call.plan.runs:
                probe = self._probe
                output = probe.run(block, forward, args, kwargs) if probe is not None else forward(*args, **kwargs)
                check_streams(self.denoiser, name, described, values, output)
                if last:
                    self._keep_residual(call, described, output)
                return output
            if last:
                values = self._filled_stack(call, described, values)
            return values[0] if len(values) == 1 else tuple(values)

        return act

    def _entry(self, call: Call, described: BlockList) -> list[Any]:
        """The streams that entered the stack, as far as they are kept, in the last block's layout."""
        assert self.spec is not None
        first = self._layouts[0].layout
        video, *others = call.entry
        entered = relayout(video, first, described.layout, call.batch, call.frames)
        return [entered, *others][: self.spec.kept]

    def _keep_residual(self, call: Call, described: BlockList, output: Any) -> None:
        assert self.spec is not None
        outputs = (output if isinstance(output, tuple) else (output,))[: self.spec.kept]
        entered = self._entry(call, described)
        before, after = [shape_of(value) for value in entered], [shape_of(value) for value in outputs]
        if before != after:
            raise UnicpError(
                f"{type(self.denoiser).__name__}: the blocks are entered with {' and '.join(map(str, before))} and "
                f"left at {described.path!r} as {' and '.join(map(str, after))}; it cannot be cached. Check its spec"
            )
        call.cache.residuals = residuals(entered, outputs)

    def _filled_stack(self, call: Call, described: BlockList, values: list[Any]) -> list[Any]:
        assert call.cache.residuals is not None
        known = zip(self._entry(call, described), call.cache.residuals, strict=True)
        filled = [before if residual is None else before + residual for before, residual in known]
        return filled + values[len(filled) :]

    # -- accounting and resetting ----------------------------------------------------------------------------------

    def _fraction(self, record: StepRecord) -> float:
        """Share of the denoiser's parameters that a call runs through."""
        if record.action == "compute":
            return 1.0
        if record.action == "partial":
            assert self.inside is not None
            return self.inside.fraction(record.units)
        return self._outside if self.needs.keep == "stack" else 0.0

    @functools.cached_property
    def _outside(self) -> float:
        inside = sum(p.numel() for block in self._blocks for p in block.parameters())
        return 1 - inside / sum(p.numel() for p in self.denoiser.parameters())

    def tensors(self) -> list[Any]:
        """Every tensor that is held between calls."""
        held = [tensor for cache in self._caches.values() for tensor in cache.tensors()]
        held += self._probe.tensors() if self._probe is not None else []
        return held + (self.inside.units.tensors() if self.inside is not None else [])

    def _clear(self) -> None:
        for policy in self.policies.values():
            self._idle, self.said = policy.why_idle(), policy.notes()
        self.policies.clear()
        self._plans.clear()
        self._caches.clear()
        self._pending.clear()
        self._call = None
        if self._probe is not None:
            self._probe.reset()
        if self.inside is not None:
            self.inside.units.clear()

    def rest(self) -> None:
        """Free what was kept, as another denoiser has taken over; should this one be called again, it computes."""
        self.settle()
        self._caches.clear()
        if self._probe is not None:
            self._probe.reset()
        if self.inside is not None:
            self.inside.units.clear()
        if self.generation is not None:
            self.generation.hold(self.name, [])

    def end(self) -> None:
        """End the generation: free everything that was kept. The next call begins another."""
        self.leaper.end()
        try:
            self.settle()
        finally:
            self._clear()
            self.clock.reset()
            if self.generation is not None:
                self.generation = None
                self._ended()

    @property
    def notes(self) -> list[str]:
        """What policies and units have to say of the last generation, or of the one in progress."""
        said = [note for policy in self.policies.values() for note in policy.notes()] or self.said
        return said + (self.inside.notes if self.inside is not None else [])

    def why_idle(self) -> str:
        """A policy's own words on why a run computed every step."""
        return self._idle or make_policy(self.config).why_idle()
