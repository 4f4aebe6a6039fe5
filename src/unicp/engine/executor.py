"""Acts decisions out on one denoiser: runs it, or fills what a policy says is not worth running."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UnicpError, UnicpWarning
from ..hosts.diffusers import compiled, hooks, parallel
from ..policies import Config, Plan, Policy, Step, make_policy
from ..specs import BlockList, ModelSpec
from ..specs.discovery import TIMESTEPS
from ..tensors.groups import summed
from ..tensors.layout import relayout
from .clock import Clock, Tick
from .fills.branch_cache import BranchCache, check_streams, leading, residuals, shape_of
from .fills.inside import Inside, plan_book
from .measure import Probe, forecast_error
from .report import Generation, StepRecord
from .sampling import not_sampling
from .solver.leap import Leaper
from .sources import STALE, TRUE, Sources
from .turns import Turns

HOOK = "unicp"
BLOCK_HOOK = "unicp_block"

STRAY = (
    "calls of another video came in the middle of this one, and were computed: of several videos at a time on one "
    "model, one is accelerated"
)
GONE = (
    "our hooks on blocks were replaced or removed by others: where they did not act, the model ran in full, and that "
    "is what the report counts; accelerate after the others have put theirs on"
)
LEAPT = "the solver took longer steps: latents taken out in mid-run are those of a later step (leap=0.0 keeps to all)"
DRAWN = "this sampler draws noise at its steps, which outputs follow: they were repeated instead of forecast"

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
    acted: int = 0  # blocks whose hooks did
    left: bool = False  # and the last one's among them, behind the first one's


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
        self._open = generation
        self._ended = ended
        self._group = group
        self.generation: Generation | None = None
        self._leaping = False  # the scheduler that can leap is that of the run in progress
        self.policies: dict[str, Policy] = {}
        self._plans: dict[str, Plan] = {}
        self._caches: dict[str, BranchCache] = {}
        self._pending: list[tuple[Policy, Step, StepRecord, Any, dict[str, tuple[int, Any]]]] = []
        self._call: Call | None = None
        self._idle = ""
        self.said: list[str] = []  # by the policies of the last video
        self.remarks: list[str] = []  # of the engine on the video in progress, or the last one
        self._warned: set[str] = set()
        self._unmeasured: set[str] = set()  # policies whose next measurement has nothing to be compared with
        self._parameters = hooks.parameters(denoiser)
        hidden = spec.hidden if spec is not None else next(iter(self._parameters), "")
        times = {spec.timestep} if spec is not None else set(TIMESTEPS)
        self.sources = Sources(denoiser, hidden, sorted(times), self._remark)
        self._make_clock = functools.partial(
            Clock.of, pipe, spec, weigh=self.needs.correct, forecasts=self.needs.order > 0
        )
        self.clock = self._make_clock()
        self.turns = Turns(self.is_over, self.end)  # of a session, where there is one
        self.hook = hooks.DenoiserHook(self.call, self._reset, self)
        self._placed: list[hooks.Placed] = []  # on blocks
        self._blocks: list[Any] = []
        self._layouts: list[BlockList] = []
        self._probe: Probe | None = None
        self.inside: Inside | None = None
        self.book: Any = None
        self.leaper = Leaper(self.clock.scheduler, self._ahead if self.needs.leap else None)
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
        """Say something of the video in progress, once."""
        if note not in self.remarks:
            self.remarks.append(note)

    # -- installing and removing -----------------------------------------------------------------------------------

    def _install(self, pipe: Any) -> None:
        if self.spec is not None and self.needs.metric is not None:
            self._probe = Probe(self.denoiser, self.spec, self.needs)
            self._probe.here = self._here
        if self.spec is not None and self.needs.units:
            measured = self._probe.blocks if self._probe is not None else ()
            self.inside = Inside(self.config, self.needs, self.denoiser, self.name, self.spec, measured, pipe)
            self.inside.units.here = self._here
        whole = getattr(self.config, "stack", self.config)
        if getattr(whole, "profile", None) is not None:
            self.book = plan_book(whole, self.denoiser, self.name, pipe)
        hooks.install(self.denoiser, self.hook, HOOK)
        if self.spec is not None and self.needs.keep == "stack":
            for position, (name, block, described) in enumerate(self.spec.stack(self.denoiser)):
                self._blocks.append(block)
                self._layouts.append(described)
                act = self._block_act(position, name, block, described)
                self._placed.append(hooks.Placed(block, self._in_turn(act), BLOCK_HOOK))
        for block in self._probe.modules if self._probe is not None else ():
            if block not in self._blocks:
                act = functools.partial(self._probe.run, block)  # type: ignore[union-attr]
                self._placed.append(hooks.Placed(block, self._in_turn(act), BLOCK_HOOK, gate_only=True))
        self._place(compiled.how_compiled(self.denoiser, self.denoiser.forward))

    def _in_turn(self, act: compiled.Act) -> compiled.Act:
        """What a module's hook does, but for calls of other threads: these go through."""

        def acts(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return act(forward, args, kwargs) if self.turns.here() else forward(*args, **kwargs)

        return acts

    def _here(self) -> bool:
        return self.turns.here()

    def _place(self, how: str) -> None:
        """Act by gates where the denoiser is compiled, by hooks where it is not: people compile before or after."""
        group = self._group or parallel.group_of(self.denoiser)
        self._shards = (self._group or parallel.shards_of(self.denoiser)) if self.needs.check else None
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
        why = not_sampling(self.denoiser, named)
        if why:
            return self._plainly(why, forward, args, kwargs)
        if not self.turns.take(self.name, self._make_clock, self.hook.contexts.current, named):
            self._remark(STRAY)
            return forward(*args, **kwargs)
        try:
            tick = self.clock.tick(self.hook.contexts.current, named)
            if tick.stray:
                self._remark(STRAY)
                return forward(*args, **kwargs)
            if tick.new_generation:
                self._place(compiled.how_compiled(self.denoiser, forward))
                self._begin()
                tick = self._told(tick, named)
            key = tick.branch if self.needs.separate else ""
            plan, deciding = self._decide(tick, key)
            plan, deciding = self._sound(tick, plan, deciding, key, named)
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
            self.sources.forget(tick.branch)
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
        self._leaping = self.clock.follows_scheduler
        if self._leaping:
            self.leaper.begin()
        self.sources.begin()

    def _told(self, tick: Tick, named: Mapping[str, Any]) -> Tick:
        """The first call of a run, told what the solver can do."""
        if not self._leaping or not self.leaper.active:
            return tick
        step = self.clock.leaps(self.clock.movable(named), self.leaper.starts)
        return dataclasses.replace(tick, step=step)

    def _plainly(self, why: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model itself, which is said once."""
        if self.generation is not None:
            self._remark(why)
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"unicp {self.config.method}: {why}", UnicpWarning, stacklevel=2)
        return forward(*args, **kwargs)

    def is_over(self) -> bool:
        """Whether the video in progress has seen its last call."""
        return self.generation is None or (self.generation.complete and self.clock.steps_known and not self._caches)

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

    def _sound(self, tick: Tick, plan: Plan, deciding: bool, key: str, named: Mapping[str, Any]) -> tuple[Plan, bool]:
        """The plan for this call, as far as what is kept may stand in for what is skipped; else to compute it."""
        step, branch = tick.step, tick.branch
        over = not plan.runs and self._over(step.index)
        state = self.sources.look(branch, step.position, named, self._leaping and self.leaper.active)
        if tick.unknown:
            self._remark(tick.unknown)
            state = STALE
        if over:  # whatever this call returns, the solver looks at nothing of it
            return plan, deciding
        cache = self._caches.get(branch)
        filling = plan.action != "compute"
        if cache is not None and (filling or cache.forecasts) and self.sources.weights_changed():
            state = STALE
        if state == STALE and cache is not None:
            self._drop(branch, key if deciding else None)
        if state != TRUE and filling:
            return Plan(action="compute"), False
        if plan.action == "forecast" and step.noisy:
            self._remark(DRAWN)
            plan = dataclasses.replace(plan, action="reuse")
        return plan, deciding

    def _drop(self, branch: str, key: str | None) -> None:
        """Nothing that is kept of a branch counts any more, nor what was measured, if it decides under this key."""
        self._caches.pop(branch, None)
        self.sources.renewed(branch)
        if self.inside is not None:
            self.inside.units.forget(branch)
        if key is not None:
            self._unmeasured.add(key)
            if self._probe is not None:
                self._probe.forget(key)

    def _over(self, index: int) -> bool:
        """Whether the solver has gone beyond this step already."""
        return self._leaping and self.leaper.over(index)

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
        if not plan.runs and self._over(step.index):
            output, record.action = cache.filled_output(step, plan, self.needs)[0], "leap"
            self._remark(LEAPT)
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
            output = self._as_it_ran(output, forward, args, kwargs, record)
            self._call = None
            changes = self.inside.finish(record) if self.inside is not None and plan.runs else {}
            scalars = None
            if measuring and self._probe is not None:
                scalars = self._probe.compare(key, batch, frames)
            elif measuring and self.needs.check:
                scalars = forecast_error(leading(output), cache.leading(), cache.sigmas, tick.step.sigma)
                if self._shards is not None:  # NaN of one is NaN of all
                    scalars = summed(scalars, self._shards) / dist.get_world_size(self._shards)
            if plan.runs and self.needs.keep == "output":
                output = cache.take(step, output, self.needs)
            if measuring and key not in self._unmeasured:
                self._pending.append((self.policies[key], tick.step, record, scalars, changes))
            if measuring:
                self._unmeasured.discard(key)
        assert self.generation is not None
        self.generation.add(record, self._fraction(record), began)
        self.generation.complete |= tick.step.count is None or tick.step.is_last(1)
        if plan.runs:
            self.generation.hold(self.name, self.tensors())
            if self.inside is not None:
                self.generation.sliced(self.name, self.inside.units.slice_tensors())
        return output

    def _as_it_ran(
        self, output: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], record: StepRecord
    ) -> Any:
        """A call's output where hooks of ours on blocks are gone: computed in full, and told as that."""
        call = self._call
        assert call is not None
        known = len(self._blocks) if call.plan.runs else call.cache.blocks
        if not self._blocks or (call.left and call.acted >= (1 if call.plan.runs else known)):
            call.cache.blocks = call.acted
            return output
        self._remark(GONE)
        call.cache.residuals = None
        record.action = "compute"
        if call.acted and not call.plan.runs:  # some acted, others did not: neither the one nor the other
            self._call = None
            output = forward(*args, **kwargs)
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
        if not self._leaping or policy is None or step is None or step.index != index:
            return None  # of another run than the one in progress
        return policy.leap(step)

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
            call.acted += 1
            if position == 0:
                call.entry = values
            last = position == len(self._blocks) - 1 and bool(call.entry)
            call.left |= last
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
        self._unmeasured.clear()
        self.sources.end()
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

    def _reset(self) -> None:
        """A pipeline says that its run is over: the one in progress, or that of another thread."""
        if self.turns.here():
            self.end()

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
        return said + self.remarks + (self.inside.notes if self.inside is not None else [])

    def why_idle(self) -> str:
        """Why a run computed every step: as the engine found it had to, or in its policy's own words."""
        return self.remarks[0] if self.remarks else self._idle or make_policy(self.config).why_idle()
