"""Recorders measure an unaccelerated run for a profile: changes of outputs from step to step, and slicing errors.

Nothing is skipped here. Sums are kept in double precision; means are taken when the profile is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..engine.arguments import named, parameters
from ..engine.clock import Clock, Tick
from ..engine.fills.units import output_change, parts, worst
from ..engine.measure import Captured, Probe
from ..engine.slicing.attention import SlicedAttention, basis, rank_grid, second_moments
from ..engine.slicing.instrumented import instrumented
from ..hosts.diffusers import hooks
from ..hosts.diffusers.compiled import eagerly
from ..policies.base import Needs
from ..specs import ATTENTION_KINDS, ModelSpec
from ..tensors import extrapolation
from ..tensors.layout import relayout

RECORDER_HOOK = "unicp_recorder"
STACK = "stack"


class Sums:
    """Running sums, maxima and counts of a calibration, by name.

    Everything is a named tensor, so it can be saved as it is and added to later.
    """

    def __init__(self, tensors: Mapping[str, Any] | None = None) -> None:
        self.tensors: dict[str, Any] = dict(tensors or {})

    def add(self, name: str, place: tuple[int, ...], shape: tuple[int, ...], value: float) -> None:
        """Add one value to the sum, the maximum and the count at a place of the array ``name``."""
        for suffix in ("sum", "max", "count"):
            self.tensors.setdefault(f"{name}.{suffix}", torch.zeros(shape, dtype=torch.float64))
        self.tensors[f"{name}.sum"][place] += value
        self.tensors[f"{name}.max"][place] = max(self.tensors[f"{name}.max"][place].item(), value)
        self.tensors[f"{name}.count"][place] += 1

    def accumulate(self, name: str, value: Any) -> None:
        value = value.double().cpu()
        self.tensors[name] = self.tensors[name] + value if name in self.tensors else value

    def mean(self, name: str) -> Any:
        """Mean of an array; infinite where nothing was counted."""
        count = self.tensors[f"{name}.count"]
        return torch.where(count > 0, self.tensors[f"{name}.sum"] / count, torch.inf).float()

    def most(self, name: str) -> Any:
        """Maximum of an array; infinite where nothing was counted."""
        count = self.tensors[f"{name}.count"]
        return torch.where(count > 0, self.tensors[f"{name}.max"], torch.inf).float()

    def has(self, name: str) -> bool:
        return f"{name}.count" in self.tensors


class Recorder:
    """Base of all recorders: it hooks one denoiser, and knows the place of each call in the run.

    Args:
        denoiser: the transformer.
        name: its name in the pipeline.
        spec: its structure.
        pipe: the pipeline, for its scheduler.
        sums: receives the measurements.
        on_step: called after every denoiser call.
    """

    def __init__(
        self, denoiser: Any, name: str, spec: ModelSpec, pipe: Any, sums: Sums, on_step: Callable[[Tick], None]
    ) -> None:
        self.denoiser, self.name, self.spec, self.sums = denoiser, name, spec, sums
        self.sigmas: list[float] = []
        self.tick: Tick | None = None
        self.steps: int | None = None
        self.batch = self.frames = 1
        self._on_step = on_step
        self._clock = Clock.of(pipe, spec)
        self._parameters = parameters(denoiser)
        self._handles: list[Any] = []
        self._hook = hooks.DenoiserHook(self._call, lambda: None, self)

    def __enter__(self) -> Recorder:
        hooks.install(self.denoiser, self._hook, RECORDER_HOOK)
        try:
            self.watch()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        hooks.uninstall(self.denoiser, self._hook, RECORDER_HOOK)
        self.unwatch()

    def _call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = named(self._parameters, args, kwargs)
        self.tick = tick = self._clock.tick(self._hook.contexts.current, call)
        self.steps = tick.step.count
        if tick.new_generation:
            self.sigmas = []
            self.begin()
        if tick.new_step:
            self.sigmas.append(tick.step.sigma)
        hidden = call.get(self.spec.hidden)
        self.batch = hidden.shape[0] if hidden is not None else 1
        self.frames = self.spec.frames(self.denoiser, call)
        self.before(tick)
        output = forward(*args, **kwargs)
        self.after(tick)
        self._on_step(tick)
        return output

    @property
    def position(self) -> int:
        """Row of the current call in the arrays: how many steps this denoiser has seen before."""
        assert self.tick is not None
        return self.tick.step.position

    def key(self, name: str) -> str:
        return f"{self.name}/{name}"

    # A recorder overrides some of these:
    def watch(self) -> None: ...
    def unwatch(self) -> None: ...
    def begin(self) -> None: ...
    def before(self, tick: Tick) -> None: ...
    def after(self, tick: Tick) -> None: ...


class ErrorRecorder(Recorder):
    """Records ``E[m, t, k]``, the change of every unit's output and of the stack's residual over 1 to ``window`` steps,
    and ``F[m, t, k]``, the error of the forecast of a unit's output at step t + k from those at t - 1 and t.

    At most ``tokens`` rows of an output, evenly spaced, are kept and compared: the result is exact up to that many
    rows, and an estimate beyond. Each unit and branch takes ``(window + 1) * tokens * channels`` values in the model's
    precision.
    """

    def __init__(self, *common: Any, window: int, damping: float, tokens: int, host: bool, limit: int) -> None:
        super().__init__(*common)
        self._damping = damping
        self._window, self._tokens, self._host, self._limit = window, tokens, host, limit
        self._history: dict[tuple[str, str], deque[tuple[int, float, Any]]] = {}
        needs = Needs(keep="nothing", metric="self_attention", strides=(1,))
        self._probe = Probe(self.denoiser, self.spec, needs, eagerly)
        self._before: dict[int, Captured] = {}  # what the probe captured last
        self._pending: list[tuple[str, tuple[int, ...], tuple[int, ...], Any]] = []
        self._entry: Any = None

    def watch(self) -> None:
        for unit in self.spec.units(self.denoiser):
            self._handles.append(unit.module.register_forward_hook(self._noting(unit.name)))
        blocks = self.spec.stack(self.denoiser)
        (_, first, entered), (_, last, left) = blocks[0], blocks[-1]

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entry = kwargs[entered.streams[0]] if entered.streams[0] in kwargs else args[0]

        def leave(_: Any, __: Any, output: Any) -> None:
            entry = relayout(self._entry, entered.layout, left.layout, self.batch, self.frames)
            self._note(STACK, (parts(output)[0] - entry,))

        self._handles.append(first.register_forward_pre_hook(enter, with_kwargs=True))
        self._handles.append(last.register_forward_hook(leave))

    def unwatch(self) -> None:
        self._probe.remove()
        self._history.clear()

    def begin(self) -> None:
        self._history.clear()
        self._probe.disarm()
        self._before = {}

    def before(self, tick: Tick) -> None:
        if tick.new_step:
            self._probe.arm(self._before, self.batch, self.frames)

    def after(self, tick: Tick) -> None:
        if tick.new_step:
            measured, self._before = self._probe.measured()
            for name, scalar in (("metric", measured.change), ("motion", measured.motion)):
                if scalar is not None:
                    self._pending.append((self.key(name), (self.position,), (self._limit,), scalar))
        if not self._pending:
            return
        values = torch.stack([scalar.float().reshape(()) for *_, scalar in self._pending]).tolist()  # one transfer
        for (name, place, shape, _), value in zip(self._pending, values, strict=True):
            if value == value and value != float("inf"):
                self.sums.add(name, place, shape, value)
        self._pending.clear()

    def _noting(self, name: str) -> Callable[..., None]:
        def note(_: Any, __: Any, output: Any) -> None:
            self._note(name, parts(output))

        return note

    def _note(self, name: str, output: Sequence[Any]) -> None:
        assert self.tick is not None
        chosen = tuple(self._sample(t) for t in output)
        history = self._history.setdefault((name, self.tick.branch), deque(maxlen=self._window + 1))
        now, sigma = self.position, self.tick.step.sigma
        before: tuple[float, Any] | None = None  # the output a step earlier, with its noise level
        for then, level, old in history:
            same = tuple(t.to(new.device) for t, new in zip(old, chosen, strict=True))
            if [t.shape for t in same] != [t.shape for t in chosen]:
                before = None
                continue
            if now - then <= self._window:
                self._compare(f"{name}/cache", then, chosen, same)
            if now - then <= self._window and before is not None and before[0] != level and name != STACK:
                factors = extrapolation.weights([level, before[0]], sigma, self._damping)
                line = [extrapolation.extrapolate(pair, factors) for pair in zip(same, before[1], strict=True)]
                self._compare(f"{name}/forecast", then, chosen, tuple(line))
            before = (level, same)
        history.append((now, sigma, tuple(t.cpu() for t in chosen) if self._host else chosen))

    def _compare(self, name: str, then: int, output: Any, filled: Any) -> None:
        """What an output is away from what would have been filled in from step ``then``."""
        error = worst(output_change(output, filled, self.batch))
        place = (then, self.position - then - 1)
        self._pending.append((self.key(name), place, (self._limit, self._window), error))

    def _sample(self, tensor: Any) -> Any:
        rows = tensor.detach().reshape(self.batch, -1, tensor.shape[-1])  # (B, rows, C)
        if rows.shape[1] <= self._tokens:
            return rows.clone()
        picked = torch.linspace(0, rows.shape[1] - 1, self._tokens, device=rows.device).long()
        return rows[:, picked]


class MomentRecorder(Recorder):
    """Records second moments of queries, keys and values as they enter the dot product, at steps that are not cached.

    Args:
        uncached: positions (rows) at which a unit is not cached, by unit.
    """

    def __init__(self, *common: Any, uncached: Mapping[str, set[int]]) -> None:
        super().__init__(*common)
        self._uncached = uncached
        self._owned: list[tuple[Any, Any]] = []

    def watch(self) -> None:
        for unit in self.spec.units(self.denoiser):
            if unit.kind not in ATTENTION_KINDS or not hasattr(unit.module, "processor"):
                continue
            twin = instrumented(unit.module.processor, self._recording(unit.name))
            if twin is not None:
                self._owned.append((unit.module, unit.module.processor))
                unit.module.processor = twin

    def unwatch(self) -> None:
        for module, processor in self._owned:
            module.processor = processor
        self._owned.clear()

    def _recording(self, name: str) -> Callable[..., Any]:
        def attend(call: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if self.position in self._uncached.get(name, ()):
                both = second_moments(query, heads_first) + second_moments(key, heads_first)
                self.sums.accumulate(self.key(f"{name}/moment_qk"), both)
                self.sums.accumulate(self.key(f"{name}/moment_v"), second_moments(value, heads_first))
            return call(query, key, value, *args, **kwargs)

        return attend


class SlicingRecorder(Recorder):
    """Records how much slicing to each rank changes an attention module's output, at some steps that are not cached.

    Args:
        uncached: positions (rows) at which a unit is measured, by unit.
    """

    def __init__(self, *common: Any, uncached: Mapping[str, set[int]]) -> None:
        super().__init__(*common)
        self._uncached = uncached
        self._hooks: list[tuple[Any, hooks.ReplacingHook]] = []
        self.ranks: dict[str, tuple[int, ...]] = {}

    def watch(self) -> None:
        for unit in self.spec.units(self.denoiser):
            moment_qk = self.sums.tensors.get(self.key(f"{unit.name}/moment_qk"))
            if moment_qk is None:
                continue
            moment_v = self.sums.tensors[self.key(f"{unit.name}/moment_v")]
            size = moment_qk.shape[-1]
            p_qk, p_v = basis(moment_qk, size), basis(moment_v, size)
            self.ranks[unit.name] = ranks = rank_grid(size)
            twins = [
                SlicedAttention(unit.module, p_qk[..., :r] if q else None, p_v[..., :r] if v else None)
                for r in ranks
                for q, v in ((True, True), (True, False), (False, True))
            ]
            hook = hooks.ReplacingHook(self._acting(unit.name, twins, len(ranks)))
            hooks.install(unit.module, hook, RECORDER_HOOK)
            self._hooks.append((unit.module, hook))

    def unwatch(self) -> None:
        for module, hook in self._hooks:
            hooks.uninstall(module, hook, RECORDER_HOOK)
        self._hooks.clear()

    def _acting(self, name: str, twins: list[SlicedAttention], count: int) -> Callable[..., Any]:
        def act(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = forward(*args, **kwargs)
            if self.tick is not None and self.position in self._uncached.get(name, ()):
                changes = [worst(output_change(twin(forward, args, kwargs), output, self.batch)) for twin in twins]
                for place, change in enumerate(torch.stack(changes).tolist()):
                    self.sums.add(self.key(f"{name}/slicing"), divmod(place, 3), (count, 3), change)
            return output

        return act
