"""UniCP: dynamic cache windows and sliced attention for each module (arXiv 2502.04393; the details reconstructed).

The paper has no public implementation. It says that the change of attention outputs between neighbouring steps is
U-shaped over a run, that an Error Aware Dynamic Cache Window (EDCW) adapts to it for each block and step, that PCA
based slicing (PCAS) serves the steps that cannot be cached, and that a Dynamic Weight Shift (DWS) switches between the
two. Every formula below is our reconstruction from that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UnicpError
from .base import NO_COUNT_NOTE, Decision, Needs, Policy, Step, no_numbers
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
from .unit_errors import UnitErrors
from .windows import Place, Target, Window

SHIFTS = ("switch", "off")
EDCW = ("profiled", "online", "off")
WINDOWS = ("shared", "block", "unit")
FILLS = ("forecast", "reuse")
STORAGES = ("full", "int8")
STATISTICS = ("mean", "max")
RENEWING_ACTIONS = ("compute", "map")
"""What makes the output that is kept a new one."""


@dataclass(frozen=True, kw_only=True)
class UniCPConfig(Config):
    """UniCP: attention modules and MLPs are forecast, sliced or computed at each step.

    ``UniCPConfig(fill="reuse", windows="unit", delta_mlp=0, pcas=True)`` is the paper as we read it; what else there
    is, is ours.

    Attributes:
        profile: what ``unicp.calibrate`` made (:class:`unicp.Profile`), or the path of one. Without one there is online
            EDCW only: slicing needs the bases a profile holds.
        fill: what stands in for a unit that is not computed: ``"forecast"``, the line in sigma through its last two
            computed outputs, damped; ``"reuse"``, the last one, as the paper has it, at half the memory.
        damping: of a forecast, per spacing of the two outputs: 1 extrapolates fully, 0 repeats the last beyond one
            spacing.
        correct: steps that are computed make good what the filled ones before them were off by, as far as their outputs
            show it (:class:`unicp.BudgetConfig`); with forecasts in shared windows, where no ``stack`` does it.
        delta: largest error of an attention output that filling may cause: sum of absolute differences between what
            stands in and what would have been computed, over the sum of absolute values; 0 fills no attention.
        delta_cross: the same for cross-attention, which changes far less from step to step; ``None`` takes ``delta``.
        delta_mlp: the same for MLPs; ``None`` takes ``delta``, 0 fills none.
        delta_prune: largest relative change of an attention output that slicing may cause; 0 slices nothing.
        target_speedup: in place of thresholds: how many times fewer operations the denoiser is to take, above 1. What
            deltas say is then how errors of kinds compare, and which kinds take part (those above 0).
        max_window: most steps in a row that one kept output serves.
        warmup_steps, cooldown_steps: first and last steps that compute everything in full.
        edcw: ``"profiled"`` takes windows from the profile (from an anchor, the longest for which the calibrated error
            stays within delta), without any measurement at run time; ``"online"`` grows each window by one while the
            error that is expected of it stays within delta, and starts again from none after a spike; ``"off"`` fills
            nothing. Without a profile ``"profiled"`` means ``"online"``.
        windows: ``"shared"``: one window for all units of a denoiser, by the mean of their errors (each as a share of
            what its kind admits); ``"block"``: one for each block; ``"unit"``: one for each module. Units that are
            computed at different steps see each other's old outputs.
        pcas: use sliced attention where the profile allows it. It is off because a sliced step is neither forecast from
            nor makes anything good: at equal operations it cost over 20 dB on the demo model.
        dws: ``"switch"`` takes the cheapest admissible of filled, sliced and full, and computes in full where a window
            can begin; ``"off"`` slices whatever is not filled, windows begin at sliced outputs (only with
            ``fill="reuse"``: no forecast is made from them).
        map_level: keep attention maps too: where a module's output has to be recomputed but its map has not (its own
            online window says so), only the values are new. For short attention: a map has tokens * tokens values a
            head. Full computations then run without the fused kernel, equal to rounding.
        map_bytes: most bytes of maps kept for a denoiser; modules beyond it keep none, and the report says so.
        max_cache_bytes: most bytes of outputs kept for a denoiser, of all guidance branches together; ``None`` is no
            limit. What ``correct`` keeps of whole outputs comes on top. The units that save the most operations for
            their bytes are kept, the others are computed, and the report says which. They are chosen after the first
            step, which then keeps nothing.
        storage: how outputs are kept: ``"full"``, in their own precision; ``"int8"``, in one byte a value and a scale
            for each token, which is half of bfloat16.
        refresh_from_sliced: a sliced output may begin a window too; only with ``fill="reuse"``.
        statistic: error over the calibration prompts and branches that decides: ``"mean"`` or ``"max"``.
        stack: config of a method that decides on whole steps (``AdaCacheConfig``, ``BudgetConfig``,
            ``ScheduleConfig``); UniCP then acts inside the steps which that one computes.

    Raises:
        UnicpError: a value is out of range, or two contradict each other.

    >>> UniCPConfig(delta=0, delta_prune=0).delta
    0
    """

    method: ClassVar[str] = "unicp"

    profile: Any = None
    fill: str = "forecast"
    damping: float = 0.85
    correct: bool = True
    delta: float = 0.1
    delta_cross: float | None = None
    delta_mlp: float | None = None
    delta_prune: float = 0.1
    target_speedup: float | None = None
    max_window: int = 6
    warmup_steps: int = 2
    cooldown_steps: int = 1
    edcw: str = "profiled"
    windows: str = "shared"
    pcas: bool = False
    dws: str = "switch"
    refresh_from_sliced: bool = False
    map_level: bool = False
    map_bytes: int = 2**28
    max_cache_bytes: int | None = None
    storage: str = "full"
    statistic: str = "mean"
    stack: Config | None = None

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """Online windows over the speed that is asked for; beside them the paper's reading over delta."""
        asked: dict[str, Config] = {f"{speed:g}x": cls(target_speedup=speed) for speed in (1.5, 2.0, 2.5, 3.0)}
        reading = cls(fill="reuse", windows="unit", max_window=5)
        paper: dict[str, Config] = {f"delta={d:g}": reading.replace(delta=d) for d in (0.05, 0.1, 0.2, 0.4)}
        return {cls.method: asked, f"{cls.method}-paper": paper}

    def __post_init__(self) -> None:
        object.__setattr__(self, "profile", checked_profile(self.profile))
        for name in ("delta", "delta_cross", "delta_mlp", "delta_prune"):
            if name not in ("delta_cross", "delta_mlp") or getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)
        check_number("damping", self.damping, low=0, high=1)
        if self.target_speedup is not None:
            check_number("target_speedup", self.target_speedup, low=1)
            for name, value, wanted in (("windows", self.windows, "shared"), ("stack", self.stack, None)):
                if value != wanted:
                    raise UnicpError(
                        "target_speedup decides on all steps, for all units together; with it "
                        f"{name} must be {wanted!r}, got {value!r:.80}"
                    )
        check_number("max_window", self.max_window, low=1, whole=True)
        check_number("warmup_steps", self.warmup_steps, low=1, whole=True)
        check_number("cooldown_steps", self.cooldown_steps, low=0, whole=True)
        check_choice("fill", self.fill, FILLS)
        check_choice("edcw", self.edcw, EDCW)
        check_choice("windows", self.windows, WINDOWS)
        check_choice("dws", self.dws, SHIFTS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("storage", self.storage, STORAGES)
        check_number("map_bytes", self.map_bytes, low=0, whole=True)
        if self.max_cache_bytes is not None:
            check_number("max_cache_bytes", self.max_cache_bytes, low=1, whole=True)
        for name in ("correct", "pcas", "map_level", "refresh_from_sliced"):
            check_flag(name, getattr(self, name))
        if self.refreshes and self.fill == "forecast":
            which = "dws='off'" if self.dws == "off" else "refresh_from_sliced=True"
            raise UnicpError(
                f"{which} lets windows begin at sliced outputs, from which nothing is forecast; leave it out, or take "
                "fill='reuse'"
            )
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
        own = {"mlp": self.delta_mlp, "cross_attention": self.delta_cross}.get(kind)
        return self.delta if own is None else own


def block_of(unit: str) -> str:
    """The block that a unit belongs to, by its module path.

    >>> block_of("transformer_blocks.3.attn1")
    'transformer_blocks.3'
    """
    found = re.match(r"(.*?\.\d+)\.", unit)
    return found.group(1) if found else unit


@register(UniCPConfig)
class UniCPPolicy(Policy):
    """The windows of :class:`UniCPConfig` for one generation."""

    def __init__(self, config: UniCPConfig) -> None:
        self.config = config
        self.inner = make_policy(config.stack) if config.stack is not None else None
        self.kinds: dict[str, str] = {}
        self.limits: dict[str, float] = {}  # of units that may be filled: the error that their kind admits
        self.errors: UnitErrors | None = None
        self.protected: frozenset[str] = frozenset()
        self.windows: list[Window] = []
        self.window: dict[str, Window] = {}  # by unit
        self.maps: dict[str, Window] = {}
        self.target: Target | None = None
        self.places: list[Place] = []  # of all steps, where a target is to know the profile's errors there
        self.spent = 0.0  # share of the operations so far that ran
        self.smallest = math.inf
        self.broken = 0
        self.endless = False  # nobody says how many steps there are, and a plan was to be made

    def needs(self) -> Needs:
        config = self.config
        kinds = ("attention", "cross_attention", "mlp")
        wanted = tuple(kind for kind in kinds if config.threshold(kind) > 0 or self._slices(kind))
        if self.inner is not None:
            inner = self.inner.needs()
        elif self.corrects:
            inner = Needs(keep="output", order=1, weights=True, correct=True, steadiness=True)
        else:
            inner = Needs(keep="nothing")
        online = config.edcw == "online" or (config.edcw == "profiled" and config.profile is None)
        maps = config.map_level and config.delta > 0
        measures = online and bool(wanted) and (config.target_speedup is None or config.map_level)
        return inner.replace(
            units=wanted,
            unit_order=1 if config.fill == "forecast" else 0,
            unit_damping=config.damping,
            unit_packed=config.storage == "int8",
            unit_changes=measures,
            late=inner.late and not measures and not maps,
            map_bytes=config.map_bytes if maps else 0,
            cache_bytes=config.max_cache_bytes,
        )

    @property
    def corrects(self) -> bool:
        """Whether computed steps make good what filled ones were off by: those between which all units are filled."""
        config = self.config
        return config.correct and config.fill == "forecast" and config.windows == "shared" and self.inner is None

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
        self.errors = errors
        limits = {name: self.config.threshold(kind) for name, kind in units.items() if name not in self.protected}
        self.limits = {name: limit for name, limit in limits.items() if limit > 0}
        sharing: dict[str, list[str]] = {}
        for name in units:
            group = {"shared": "", "block": block_of(name), "unit": name}[self.config.windows]
            sharing.setdefault(group if name in self.limits else name, []).append(name)
        self.windows = [self._new_window(members) for members in sharing.values()]
        self.window = {name: window for window in self.windows for name in window.members}
        if self.config.target_speedup is not None:
            self.target = Target(
                speedup=self.config.target_speedup,
                max_window=self.config.max_window,
                cooldown=self.config.cooldown_steps,
            )

    def _new_window(self, members: Sequence[str]) -> Window:
        limits = {name: self.limits[name] for name in members if name in self.limits}
        rows = self.errors.together(limits) if self.errors is not None else None
        limit = next(iter(limits.values()), 0.0)
        return Window(members=tuple(members), limit=limit, rows=rows, forecasts=self.config.fill == "forecast")

    @property
    def online(self) -> bool:
        """Whether windows come from what is measured in this very run."""
        return self.config.edcw == "online" or (self.config.edcw == "profiled" and self.errors is None)

    def decide(self, step: Step) -> Decision:
        config = self.config
        if self.inner is not None:
            decided = self.inner.decide(step)
            if decided.action != "compute":
                return decided
        else:
            decided = Decision(action="compute")
        # Without a profile a target follows a plan, which wants the number of steps: nothing is measured in its place.
        planned = self.target is not None and (self.online or self.errors is None)
        self.endless |= planned and step.count is None
        forced = step.position < config.warmup_steps or step.is_last(config.cooldown_steps)
        forced |= self.endless
        place = Place.of(step, self.errors)
        renewing = RENEWING_ACTIONS if not config.refreshes else (*RENEWING_ACTIONS, "slice")
        actions = {}
        for window in self.windows:
            filled = not forced and self._filled(step, window, place)
            for name in window.members:
                if forced or name in self.protected:
                    actions[name] = "compute"
                elif filled:
                    actions[name] = config.fill
                elif self._sliced(step, name, window, place):
                    actions[name] = "slice"
                elif name in self.maps and step.index < self.maps[name].due:
                    actions[name] = "map"
                else:
                    actions[name] = "compute"
            if all(actions[name] in renewing for name in window.members):
                window.renew(place)
            if all(actions[name] == "map" for name in window.members):
                window.due = step.index + 1
        if all(action == "compute" for action in actions.values()):
            return decided
        return replace(decided, action="partial", units=actions, makeshift=self.corrects)

    def _filled(self, step: Step, window: Window, place: Place) -> bool:
        """Whether what is kept serves a step."""
        if not window.ready or self.config.edcw == "off" or window.limit == 0:
            return False
        if self.target is not None and step.count is not None:
            if window.anchors[0].index == step.index - 1:
                window.due = self._due(step, window, place)
            return step.index < window.due
        within = step.index - window.anchors[0].index <= self.config.max_window
        if self.online:
            return within and step.index < window.due
        error = window.calibrated(place)
        self.smallest = min(self.smallest, error / window.limit)
        window.open &= within and error <= window.limit
        return window.open

    def _sliced(self, step: Step, name: str, window: Window, place: Place) -> bool:
        """Whether attention runs sliced at a step that what is kept cannot serve."""
        config, errors = self.config, self.errors
        sliced = errors.sliced.get(name) if errors is not None and config.pcas else None
        if sliced is None or errors is None or not sliced <= config.delta_prune or not window.anchors:
            return False
        if config.refreshes or window.limit == 0 or config.edcw == "off":
            return True
        if self.target is not None and step.count is not None:
            new = replace(window, anchors=[place, *window.anchors])
            after = replace(step, index=step.index + 1, position=step.position + 1)
            return after.index < step.count and self._due(after, new, place) == after.index
        if self.online:  # what was measured last opened no window; every second step is measured again
            return window.due == step.index == window.anchors[0].index + 1
        following = replace(place, calibrated=place.calibrated + errors.steps / (step.count or errors.steps))
        return not window.calibrated(following, [place, *window.anchors]) <= window.limit

    def _due(self, step: Step, window: Window, place: Place) -> int:
        """The next step at which the shared window's units are computed, for the speed that is asked for."""
        assert self.target is not None and step.count is not None
        if window.rows is not None and not self.places:
            assert self.errors is not None
            known = self.errors.sigmas  # where nobody tells the run's own, the same share of the calibration's
            levels = step.sigmas or [known[i * len(known) // step.count] for i in range(step.count)]
            steps = [replace(step, index=i, sigma=levels[i]) for i in range(step.count)]
            self.places = [Place.of(each, self.errors) for each in steps]
        here = place if place.index == step.index else replace(place, index=step.index)
        self.target.spent = self.spent * step.position
        return self.target.due(window, here, step.count, step.index - step.position, self.places)

    def price(self, units: Mapping[str, float], spent: float) -> None:
        self.spent = spent
        if self.target is not None:
            self.target.saved = sum(units.get(name, 0.0) for name in self.limits)

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:
        if self.inner is not None:
            self.inner.observe(step, change, motion)

    def observe_units(self, step: Step, changes: Mapping[str, tuple[int, float | None]]) -> None:
        """Online EDCW: set each window anew.

        Args:
            changes: by unit that was computed in full, and by its name with ``/map`` for its attention maps: steps
                since it was before, and the error that what was kept then would have had
                (``None`` at the first computation).
        """
        found: dict[Window, list[tuple[float, int, float]]] = {}
        place = Place.of(step, None)
        for name, (age, change) in changes.items():
            unit = name.removesuffix("/map")
            if unit != name:
                window = self.maps.setdefault(unit, Window(members=(name,), limit=self.config.delta))
                if not found.get(window):
                    window.renew(place)
            else:
                window = self.window[name]
                if not self.online or unit not in self.limits or window.anchors[0].index != step.index:
                    continue
            self.broken += age > 0 and (change is None or not math.isfinite(change))
            limit = self.config.threshold(self.kinds[unit])
            found.setdefault(window, []).append((limit, max(age, 1), math.inf if change is None else change))
        for window, measured in found.items():
            expected = window.measured(measured, self.config.max_window + 1)
            self.smallest = min(self.smallest, expected)

    def notes(self) -> list[str]:
        said = self.inner.notes() if self.inner is not None else []
        target = self.target
        if self.endless:
            said.append(NO_COUNT_NOTE.format(so="target_speedup cannot be had, and all were computed"))
        if target is not None and target.reachable is not None and target.reachable < 0.97 * target.speedup:
            more = "max_window" if self.config.max_cache_bytes is None else "max_cache_bytes or max_window"
            said.append(
                f"target_speedup={target.speedup:g}: no more than {target.reachable:.2f} can be had; raise {more}, "
                "or let more kinds of units be filled"
            )
        if self.config.profile is None and self.config.pcas and self.config.delta_prune > 0:
            said.append("sliced attention (PCAS) needs a profile: unicp calibrate makes one; nothing was sliced")
        return said + ([no_numbers(self.broken)] if self.broken else [])

    def why_idle(self) -> str:
        config = self.config
        if self.inner is not None and config.delta == 0:
            return self.inner.why_idle()
        if self.endless:
            return NO_COUNT_NOTE.format(so="target_speedup cannot be had")
        if not self.limits:
            return "every delta is 0, which computes everything in full; give delta=0.1"
        if self.smallest <= 1:
            return "its errors came within delta only where no step was left to fill; give more steps, or raise delta"
        if self.smallest < math.inf:
            return (
                f"the smallest change it saw is {self.smallest:.2g} times what delta admits; raise delta, or "
                "delta_prune for slicing"
            )
        return "the run was too short to keep anything between its forced first and last steps; give more steps"


def planned(config: UniCPConfig, errors: UnitErrors, units: Mapping[str, str]) -> list[dict[str, str]]:
    """What UniCP would do at each step of the calibrated run: for each step the action of every unit.

    >>> errors = UnitErrors(sigmas=[1.0, 0.8, 0.6, 0.4], cache={"a": [[0.05]] * 4}, steps=4)
    >>> config = UniCPConfig(delta=0.1, warmup_steps=1, cooldown_steps=1, max_window=1, fill="reuse")
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
