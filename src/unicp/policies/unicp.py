"""UniCP: dynamic cache windows and sliced attention for each module (arXiv 2502.04393; the details reconstructed).

The paper has no public implementation. It says that the change of attention outputs between neighbouring steps is
U-shaped over a run, that an Error Aware Dynamic Cache Window (EDCW) adapts to it for each block and step, that PCA
based slicing (PCAS) serves the steps that cannot be cached, and that a Dynamic Weight Shift (DWS) switches between the
two. Every formula below is our reconstruction from that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UnicpError
from .base import Decision, Needs, Policy, Step, no_numbers
from .config import (
    Config,
    check_choice,
    check_flag,
    check_number,
    checked_profile,
    config_from_dict,
    make_policy,
    register,
)
from .unit_errors import UnitErrors, shared_error

SHIFTS = ("switch", "blend", "delta", "off")
WINDOWS = ("profiled", "online", "off")
STATISTICS = ("mean", "max")
RENEWING_ACTIONS = ("compute", "map")
"""What makes the output that is kept a new one."""


@dataclass(frozen=True, kw_only=True)
class UniCPConfig(Config):
    """UniCP: every attention module (and MLP, if wanted) is cached, sliced or computed at each step.

    Attributes:
        profile: what ``unicp.calibrate`` made (:class:`unicp.Profile`), or the path of one. Without one there is online
            EDCW only: slicing needs the bases a profile holds.
        delta: largest relative change (sum of absolute differences over sum of absolute values) of an attention
            output that caching may cause; 0 caches no attention.
        delta_cross: the same for cross-attention, which changes far less from step to step; ``None`` takes ``delta``.
        delta_mlp: the same for MLPs; 0, the default, caches none.
        delta_prune: largest relative change of an attention output that slicing may cause; 0 slices nothing.
        max_window: most steps in a row that one kept output serves.
        warmup_steps, cooldown_steps: first and last steps that compute everything in full.
        edcw: ``"profiled"`` takes windows from the profile (from an anchor, the longest for which the calibrated error
            stays within delta), without any measurement at run time; ``"online"`` grows each window by one while the
            measured change per step times the window stays within delta, and starts again from one after a spike;
            ``"off"`` caches nothing. Without a profile ``"profiled"`` means ``"online"``.
        shared_windows: one window for all units of a denoiser, by the mean of their errors (each as a share of what its
            kind admits), instead of one for each as the paper has it. Ours: units that are computed at different steps
            see each other's old outputs, which on the demo model cost more than what windows of their own gain.
        pcas: use sliced attention where the profile allows it.
        dws: ``"switch"`` takes the cheapest admissible of cached, sliced and full, and computes in full where a window
            can begin; ``"blend"`` and ``"delta"`` take, where ``"switch"`` would slice, the mean of the sliced and
            the kept output weighted by the inverse squares of their errors, or the kept output plus the change of the
            sliced one since; ``"off"`` slices whatever is not cached, windows begin at sliced outputs.
        map_level: keep attention maps too: where a module's output has to be recomputed but its map has not (its own
            online window says so), only the values are new. For short attention: a map has tokens * tokens values a
            head. Full computations then run without the fused kernel, equal to rounding.
        map_bytes: most bytes of maps kept for a denoiser; modules beyond it keep none, and the report says so.
        max_cache_bytes: most bytes of outputs kept for a denoiser, of all guidance branches together; ``None`` is no
            limit. The units that save the most operations for their bytes are kept, the others are computed, and the
            report says which. They are chosen after the first step, which then keeps nothing.
        refresh_from_sliced: a sliced output may begin a window too.
        statistic: error over the calibration prompts and branches that decides: ``"mean"`` or ``"max"``.
        stack: config of a method that decides on whole steps (``AdaCacheConfig``, ``BudgetConfig``,
            ``ScheduleConfig``); UniCP then acts inside the steps which that one computes.

    Raises:
        UnicpError: a value is out of range.

    >>> UniCPConfig(delta=0, delta_prune=0).delta
    0
    """

    method: ClassVar[str] = "unicp"

    profile: Any = None
    delta: float = 0.1
    delta_cross: float | None = None
    delta_mlp: float = 0.0
    delta_prune: float = 0.1
    max_window: int = 6
    warmup_steps: int = 2
    cooldown_steps: int = 1
    edcw: str = "profiled"
    shared_windows: bool = False
    pcas: bool = True
    dws: str = "switch"
    refresh_from_sliced: bool = False
    map_level: bool = False
    map_bytes: int = 2**28
    max_cache_bytes: int | None = None
    statistic: str = "mean"
    stack: Config | None = None

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """Online windows over delta: what UniCP can do without a profile."""

        def over(*deltas: float, **fields: Any) -> dict[str, Config]:
            return {f"delta={d:g}": cls(delta=d, delta_mlp=d, edcw="online", **fields) for d in deltas}

        shared = over(0.1, 0.15, 0.2, 0.4, shared_windows=True)
        return {cls.method: over(0.05, 0.1, 0.2, 0.4), f"{cls.method}-shared": shared}

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", checked_profile(self.profile))
        for name in ("delta", "delta_cross", "delta_mlp", "delta_prune"):
            if name != "delta_cross" or self.delta_cross is not None:
                check_number(name, getattr(self, name), low=0)
        check_number("max_window", self.max_window, low=1, whole=True)
        check_number("warmup_steps", self.warmup_steps, low=1, whole=True)
        check_number("cooldown_steps", self.cooldown_steps, low=0, whole=True)
        check_choice("edcw", self.edcw, WINDOWS)
        check_choice("dws", self.dws, SHIFTS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_number("map_bytes", self.map_bytes, low=0, whole=True)
        if self.max_cache_bytes is not None:
            check_number("max_cache_bytes", self.max_cache_bytes, low=1, whole=True)
        for name in ("shared_windows", "pcas", "map_level", "refresh_from_sliced"):
            check_flag(name, getattr(self, name))
        stack: Any = self.stack
        if isinstance(stack, Mapping):  # as JSON has it
            stack = config_from_dict(stack)
            object.__setattr__(self, "stack", stack)
        if stack is not None and (not isinstance(stack, Config) or isinstance(stack, UniCPConfig)):
            raise UnicpError(f"stack must be an AdaCacheConfig, a BudgetConfig or a ScheduleConfig, got {stack!r:.80}")

    def shared(self, denoisers: int) -> UniCPConfig:
        return self if self.stack is None else self.replace(stack=self.stack.shared(denoisers))

    @property
    def refreshes(self) -> bool:
        """Whether a sliced output may begin a window."""
        return self.refresh_from_sliced or self.dws == "off"

    def threshold(self, kind: str) -> float:
        """Largest admissible caching error of a kind of unit."""
        if kind == "mlp":
            return self.delta_mlp
        return self.delta if kind != "cross_attention" or self.delta_cross is None else self.delta_cross


def _place(errors: UnitErrors, step: Step) -> float:
    return errors.place(step.index, step.count, step.sigma)


class UnitState:
    """The window of one unit, or the one that units share."""

    def __init__(self) -> None:
        self.anchor: int | None = None  # step of the last output that is kept
        self.place = 0.0  # where that lies in the profile
        self.open = False  # profiled: the window that began there has not met an error above the limit
        self.due = 0  # online: the next step to recompute
        self.window = 1


@register(UniCPConfig)
class UniCPPolicy(Policy):
    """The windows of :class:`UniCPConfig` for one generation."""

    def __init__(self, config: UniCPConfig) -> None:
        self.config = config
        self.inner = make_policy(config.stack) if config.stack is not None else None
        self.kinds: dict[str, str] = {}
        self.errors: UnitErrors | None = None
        self.windows: UnitErrors | None = None  # the errors that windows go by: those, or shared ones
        self.protected: frozenset[str] = frozenset()
        self.sharing: frozenset[str] = frozenset()
        self.whole = True  # all that shares a window was new at this step
        self.halved = False  # the unconditional branch did not run at this step
        self.state: dict[str, UnitState] = {}
        self.maps: dict[str, UnitState] = {}
        self.smallest = math.inf
        self.broken = 0

    def needs(self) -> Needs:
        kinds = ("attention", "cross_attention", "mlp")
        wanted = tuple(kind for kind in kinds if self.config.threshold(kind) > 0 or self._slices(kind))
        inner = self.inner.needs() if self.inner is not None else Needs(keep="nothing")
        online = self.config.edcw == "online" or (self.config.edcw == "profiled" and self.config.profile is None)
        maps = self.config.map_bytes if self.config.map_level and self.config.delta > 0 else 0
        return inner.replace(
            units=wanted, unit_changes=online and bool(wanted), map_bytes=maps, cache_bytes=self.config.max_cache_bytes
        )

    def _slices(self, kind: str) -> bool:
        return kind == "attention" and self.config.pcas and self.config.delta_prune > 0

    def attach(self, units: Mapping[str, str], protected: Sequence[str], errors: Any) -> None:
        """Meet the denoiser.

        Args:
            units: kind of every unit by name.
            protected: units in the block that the stack's policy measures. They are always computed: a kept output
                would seem not to change.
            errors: :class:`UnitErrors` of a profile, or ``None``.
        """
        self.kinds = dict(units)
        self.protected = frozenset(protected)
        self.errors = self.windows = errors
        self.state = {name: UnitState() for name in units}
        if self.config.shared_windows:
            limits = {name: self.config.threshold(kind) for name, kind in units.items() if name not in self.protected}
            limits = {name: limit for name, limit in limits.items() if limit > 0}
            self.sharing = frozenset(limits)
            self.state |= dict.fromkeys(limits, UnitState())
            self.windows = errors.shared(limits) if errors is not None else None

    @property
    def online(self) -> bool:
        """Whether windows come from what is measured in this very run."""
        return self.config.edcw == "online" or (self.config.edcw == "profiled" and self.errors is None)

    def decide(self, step: Step) -> Decision:
        config = self.config
        if self.inner is not None:
            decided = self.inner.decide(step)
            self.halved = decided.action == "conditional"
            if decided.action != "compute":
                return decided
        else:
            decided = Decision(action="compute")
        whole = decided.whole
        forced = whole or step.position < config.warmup_steps or step.is_last(config.cooldown_steps)
        actions, weights = {}, {}
        for name, state in self.state.items():
            full = forced or name in self.protected
            action, weight = ("compute", 0.0) if full else self._unit(step, name, state)
            if action == "compute" and not full and name in self.maps and step.index < self.maps[name].due:
                action = "map"
            actions[name] = action
            if action == "blend":
                weights[name] = weight
        self._anchor(step, actions)
        if all(action == "compute" for action in actions.values()):
            return decided
        return replace(decided, action="partial", units=actions, weights=weights)

    def _anchor(self, step: Step, actions: Mapping[str, str]) -> None:
        """Windows begin where what is kept is new; the shared one where all of it is."""
        new = {
            name
            for name, act in actions.items()
            if act in RENEWING_ACTIONS or (self.config.refreshes and act != "reuse")
        }
        self.whole = self.sharing <= new
        if not self.whole:
            new -= self.sharing
        place = _place(self.errors, step) if self.errors is not None else 0.0
        for name in new:
            state = self.state[name]
            state.anchor, state.place, state.open = step.index, place, True
            if actions[name] == "map":
                state.due = step.index + 1

    def _unit(self, step: Step, name: str, state: UnitState) -> tuple[str, float]:
        config, windows = self.config, self.windows
        if state.anchor is None:
            return "compute", 0.0
        limit = config.threshold(self.kinds[name])
        age = step.index - state.anchor
        caching = config.edcw != "off" and limit > 0
        if self.online:
            if caching and step.index < state.due and age <= config.max_window:
                return "reuse", 0.0
        elif windows is not None and name in windows.cache:
            error = windows.caching(name, state.place, _place(windows, step))
            self.smallest = min(self.smallest, error / limit) if limit > 0 else self.smallest
            state.open &= caching and error <= limit and age <= config.max_window
            if state.open:
                return "reuse", 0.0
        return self._uncached(step, name, state, limit if caching else 0.0)

    def _uncached(self, step: Step, name: str, state: UnitState, limit: float) -> tuple[str, float]:
        """Sliced or in full, at a step that what is kept cannot serve."""
        config, errors, windows = self.config, self.errors, self.windows
        sliced = errors.sliced.get(name) if errors is not None and config.pcas else None
        if sliced is None or errors is None or windows is None or not sliced <= config.delta_prune:
            return "compute", 0.0
        if config.dws == "off":
            return "slice", 0.0
        if not config.refreshes and not self.online:
            now = _place(errors, step)
            following = now + errors.steps / (step.count or errors.steps)
            if limit > 0 and windows.caching(name, now, following) <= limit:
                return "compute", 0.0  # a window begins here, and what it keeps must be whole
        age = step.index - state.anchor if state.anchor is not None else 0
        known = not self.online and name in errors.cache
        error = errors.caching(name, state.place, _place(errors, step)) if known else math.inf
        if config.dws == "switch" or age > config.max_window or not math.isfinite(error):
            # An old anchor helps no mean and no difference; a new one does.
            return ("slice" if config.dws == "switch" else "compute"), 0.0
        if config.dws == "delta":
            return "delta", 0.0
        total = error**2 + sliced**2
        return "blend", (error**2 / total if total else 1.0)

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:
        if self.inner is not None:
            self.inner.observe(step, change, motion)

    def observe_units(self, step: Step, changes: Mapping[str, tuple[int, float | None]]) -> None:
        """Online EDCW: set each window anew.

        Args:
            changes: by unit that was computed in full, and by its name with ``/map`` for its attention maps: steps
                since it was before, and the relative change since
                (``None`` at the first computation).
        """
        if self.halved:
            return  # what that branch keeps is as old as before, and windows are the branches' own
        found: dict[UnitState, list[tuple[float, int, float]]] = {}
        for name, (age, change) in changes.items():
            unit = name.removesuffix("/map")
            if unit != name:
                state = self.maps.setdefault(unit, UnitState())
            elif self.online and (self.whole or name not in self.sharing):
                state = self.state[name]
            else:
                continue
            self.broken += age > 0 and (change is None or not math.isfinite(change))
            limit = self.config.threshold(self.kinds[unit])
            found.setdefault(state, []).append((limit, max(age, 1), math.inf if change is None else change))
        for state, measured in found.items():
            self._measured(step, state, measured)

    def _measured(self, step: Step, state: UnitState, found: Sequence[tuple[float, int, float]]) -> None:
        """Set a window by the limit, the age and the change of what it is for."""
        limit = found[0][0]
        change = shared_error(limit, ((own, change) for own, _, change in found))
        per_step = shared_error(limit, ((own, change / age) for own, age, change in found))
        window = 1
        if limit > 0:
            self.smallest = min(self.smallest, per_step / limit)
        if change <= limit:  # a spike, or no number, starts again from one
            window = min(state.window + 1, self.config.max_window)
            while window > 1 and per_step * window > limit:
                window -= 1
        state.window = window
        state.due = step.index + window

    def notes(self) -> list[str]:
        said = self.inner.notes() if self.inner is not None else []
        if self.config.profile is None and self.config.pcas and self.config.delta_prune > 0:
            said.append("sliced attention (PCAS) needs a profile: unicp calibrate makes one; nothing was sliced")
        return said + ([no_numbers(self.broken)] if self.broken else [])

    def why_idle(self) -> str:
        config = self.config
        if self.inner is not None and config.delta == 0:
            return self.inner.why_idle()
        if config.delta == 0 and config.delta_mlp == 0:
            return "delta is 0, which computes everything in full; give delta=0.1"
        if self.smallest < math.inf:
            return (
                f"the smallest change it saw is {self.smallest:.2g} times what delta admits; raise delta, or "
                "delta_prune for slicing"
            )
        return "the run was too short to keep anything between its forced first and last steps; give more steps"


def planned(config: UniCPConfig, errors: UnitErrors, units: Mapping[str, str]) -> list[dict[str, str]]:
    """What UniCP would do at each step of the calibrated run: for each step the action of every unit.

    >>> errors = UnitErrors(sigmas=[1.0, 0.8, 0.6, 0.4], cache={"a": [[0.05]] * 4}, steps=4)
    >>> config = UniCPConfig(delta=0.1, warmup_steps=1, cooldown_steps=1, max_window=1)
    >>> [plan["a"] for plan in planned(config, errors, {"a": "self_attention"})]
    ['compute', 'reuse', 'compute', 'compute']
    """
    policy = UniCPPolicy(config)
    policy.attach(units, (), errors)
    first = errors.steps - len(errors.sigmas)  # the second of two denoisers begins later
    plans = []
    for position, sigma in enumerate(errors.sigmas):
        step = Step(index=first + position, count=errors.steps, position=position, sigma=sigma)
        plan = policy.decide(step)
        plans.append({unit: plan.units.get(unit, "compute") for unit in units})
    return plans
