"""When to compute: pure state machines over scalars, testable without a model.

A policy is found by the type of its config. A new policy is one new module in this package: a frozen config
dataclass, a :class:`Policy`, and ``@register`` on it. The command line, the contract tests and the documentation
enumerate :func:`config_types`.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import UnicpError, unknown

ACTIONS = ("compute", "reuse", "forecast", "partial", "conditional")
"""What can be planned for a step: all of the denoiser runs; a cached value is added; its output is extrapolated; some
units of it run; it runs, but for the unconditional branch, whose output is extrapolated."""
UNIT_ACTIONS = ("compute", "reuse", "map", "slice", "blend", "delta")
"""What can happen to a unit in a partial call: it ran in full; its kept output was used; it ran on its kept attention
map; it ran sliced; the sliced and the kept output were mixed; the kept output was moved by the change of the sliced."""


def unconditional(branch: str) -> bool:
    """Whether a guidance branch is the one without the prompt, by the name that pipelines and guiders give it.

    >>> unconditional("uncond"), unconditional("cond_uncond"), unconditional("call 2")
    (True, False, False)
    """
    return branch in ("uncond", "pred_uncond")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where in a generation a decision is asked for.

    Attributes:
        index: denoising step, 0 for the first.
        count: number of denoising steps, or ``None`` where nobody says.
        position: how many steps of this generation this denoiser has seen before. It differs from ``index`` for
            the second of two denoisers (Wan 2.2).
        began: the run's first step, of whichever denoiser: above 0 for a video made from another one (``strength``).
        sigma: noise level, falling over the run.
        sigmas: noise levels of all steps of the run, or ``None`` where nobody says.
        weights: what the pipeline's solver makes of the output of each step (``engine/solver/response.py``), where a
            policy asked for it and it can be told.
        leaps: the solver can take longer steps, where a policy asked for it.
        free: and to noise levels that lie between those of the run.
        starts: and a short first step before the long ones is worth its cost.
        noisy: the sampler draws noise at its steps.
    """

    index: int
    count: int | None
    position: int
    sigma: float
    began: int = 0
    sigmas: tuple[float, ...] | None = dataclasses.field(default=None, compare=False, repr=False)
    weights: tuple[float, ...] | None = dataclasses.field(default=None, compare=False, repr=False)
    leaps: bool = dataclasses.field(default=False, compare=False)
    free: bool = dataclasses.field(default=False, compare=False)
    starts: bool = dataclasses.field(default=False, compare=False)
    noisy: bool = dataclasses.field(default=False, compare=False)

    @property
    def weight(self) -> float | None:
        """What the solver makes of this step's output, where that is known."""
        known = self.weights is not None and self.index < len(self.weights)
        return self.weights[self.index] if known and self.weights else None

    def is_last(self, steps: int) -> bool:
        """Whether this is one of the last ``steps`` steps; never, where the number of steps is unknown."""
        return self.count is not None and self.index >= self.count - steps


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to do at a step.

    Attributes:
        action: one of :data:`ACTIONS`.
        damping: of a forecast, per spacing of the outputs it is made from
            (:func:`unicp.tensors.extrapolation.weights`): 1 extrapolates fully, 0 repeats the last value.
        order: of a forecast: degree of the extrapolation; ``None`` is the highest that is kept (``Needs.order``).
        place: where on the run's grid a computed step is evaluated, in steps: its own index if ``None``, else at most
            one step behind it.
        units: action of each unit by module name, where ``action`` is ``"partial"``: one of :data:`UNIT_ACTIONS`.
        weights: for units that blend: weight of the sliced output, 0 to 1.
        whole: nothing may be left out inside of this step, whatever acts inside of steps.
    """

    action: str
    damping: float = 1.0
    order: int | None = None
    place: float | None = None
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    whole: bool = False

    @property
    def runs(self) -> bool:
        """Whether the denoiser itself is called."""
        return self.action in ("compute", "partial")

    def of_branch(self, branch: str) -> Plan:
        """What a guidance branch does."""
        if self.action != "conditional":
            return self
        return dataclasses.replace(self, action="forecast" if unconditional(branch) else "compute")


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a policy wants from the engine. All of it is fixed for the life of a policy.

    Attributes:
        keep: value that is kept at a computed step to fill later ones: ``"stack"`` (the block stack's residual),
            ``"output"`` (the denoiser's whole output) or ``"nothing"``.
        order: degree of the extrapolation of a kept output; 0 is plain reuse.
        metric: sub-layer whose residual is compared between computed steps (a key of ``BlockList.residuals``), or
            ``None`` if the policy looks at nothing.
        location: in which blocks: ``"start"``, ``"mid"``, ``"end"`` or ``"all"``.
        strides: frame distances of the motion score; empty if it is not wanted.
        separate: decide for every guidance branch on its own.
        units: kinds of units that act on their own: ``"attention"`` (among video tokens), ``"cross_attention"``,
            ``"mlp"``.
        check: at every computed step compare the denoiser's output with what a forecast would have made of it; that is
            then the change that :meth:`Policy.observe` is given.
        correct: at a computed step, make good what the forecasts since the last one were off by, as far as the new
            output shows it (:meth:`BranchCache.take`).
        steadiness: at every computed step measure how steadily the outputs change, and let forecasts go by it
            (:func:`unicp.tensors.extrapolation.steadiness`).
        unit_changes: compare the full output of every unit with the one before.
        map_bytes: most bytes of attention maps to keep; 0 keeps none.
        leap: where the solver can take longer steps, ask :meth:`Policy.leap` for them.
    """

    keep: str
    order: int = 0
    metric: str | None = None
    location: str = "mid"
    strides: tuple[int, ...] = ()
    separate: bool = False
    units: tuple[str, ...] = ()
    check: bool = False
    correct: bool = False
    steadiness: bool = False
    unit_changes: bool = False
    map_bytes: int = 0
    leap: bool = False

    def replace(self, **changes: Any) -> Needs:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    @property
    def inside(self) -> bool:
        """Whether the structure of the denoiser has to be known."""
        return bool(self.metric or self.keep == "stack" or self.units)


class Policy(abc.ABC):
    """Decides, at every denoising step, what is computed. One instance decides for one generation.

    Attributes:
        inner: the policy of whole steps, for one that acts inside of the steps which that one computes.
    """

    inner: Policy | None = None

    @abc.abstractmethod
    def needs(self) -> Needs:
        """What the engine has to keep and to measure."""

    @abc.abstractmethod
    def plan(self, step: Step) -> Plan:
        """The decision for this step. Called once a step, in order."""

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:  # noqa: B027
        """Take note of what a computed step measured.

        Args:
            step: the step that was computed.
            change: relative change of the metric since the last computed step (``None`` at the first).
            motion: motion score, ``None`` if not asked for.
        """

    def attach(self, units: Mapping[str, str], protected: Sequence[str], errors: Any) -> None:  # noqa: B027
        """Meet the denoiser, before the first decision; only policies that act on units care."""

    def observe_units(self, step: Step, changes: Mapping[str, tuple[int, float | None]]) -> None:  # noqa: B027
        """Take note of what the units that were computed in full measured."""

    def leap(self, step: Step) -> tuple[float, ...] | None:
        """Where the solver goes from a step that was just computed: the places of its further steps, in order.

        Places count steps of the run and may lie between two of them where ``Step.free`` says so; the next one is then
        computed at the step it has passed last. With none left the solver goes to the end. ``None`` is the next step.
        What a policy says here it keeps to: :meth:`plan` computes none of the steps between.
        """
        return None

    def notes(self) -> list[str]:
        """What a user should know of this generation beside the records; one sentence each."""
        return []

    @abc.abstractmethod
    def why_idle(self) -> str:
        """Why a whole run may have computed every step, and what to do: for the warning."""


ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What the public configs share: JSON round trip and copies with other values."""

    method: ClassVar[str]
    """Name of the method on the command line and in JSON."""
    schedule_only: ClassVar[bool] = False
    """True if the decisions need no measurement inside the blocks, so that any denoiser will do."""

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """A copy with other values; unknown names are errors."""
        _check_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """What a comparison tries of this method: for each curve, by name, configs from mild to bold, by label.

        Args:
            steps: denoising steps of the run.
        """
        return {cls.method: {"default": cls()}}

    def spread(self) -> dict[str, Config]:
        """What a comparison tries of this very config, by label: itself, or its like at other costs."""
        return {}

    def shared(self: ConfigT, denoisers: int) -> ConfigT:
        """What each of several denoisers of a pipeline gets: what may be spent once in a video is divided."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the method's name under ``"method"``."""
        return {"method": self.method, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _check_keys(kind: type[Config], values: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise unknown(f"field of {kind.__name__}", key, names)


_REGISTRY: dict[type[Config], Callable[[Any], Policy]] = {}
PolicyT = TypeVar("PolicyT", bound=Callable[[Any], Policy])


def register(config_type: type[Config]) -> Callable[[PolicyT], PolicyT]:
    """Class decorator: this policy serves configs of this type."""

    def decorate(policy: PolicyT) -> PolicyT:
        _REGISTRY[config_type] = policy
        return policy

    return decorate


def config_types() -> dict[str, type[Config]]:
    """Every config type by its method's name. All modules of this package are imported for it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {kind.method: kind for kind in _REGISTRY}


def make_policy(config: Config) -> Policy:
    """A fresh policy for a config."""
    config_types()
    for kind in type(config).__mro__:
        if kind in _REGISTRY:
            return _REGISTRY[kind](config)
    raise unknown("config type", type(config).__name__, [kind.__name__ for kind in _REGISTRY])


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that :meth:`Config.to_dict` or its JSON describes.

    >>> config_from_dict({"method": "schedule", "interval": 2}).interval
    2
    """
    if not isinstance(values, Mapping) or "method" not in values:
        raise UnicpError(f"a config is a mapping with a 'method', got {values!r:.80}")
    kinds = config_types()
    check_choice("method", values["method"], tuple(kinds))
    kind = kinds[values["method"]]
    rest = {key: _tuples(value) for key, value in values.items() if key != "method"}
    _check_keys(kind, rest)
    return kind(**rest)


def _tuples(value: Any) -> Any:
    # JSON has lists only; the configs hold tuples.
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


NO_COUNT = (
    "nothing tells how many steps this run has ({so}): accelerate the pipeline itself, or call the denoiser in "
    "cache_context(name, step_index=i, num_inference_steps=n)"
)
"""The note of a policy that wants to know; ``so`` says what follows from it."""


def no_numbers(count: int) -> str:
    """The note on measurements that no decision can rest on."""
    return f"{count} measurements were not finite numbers; what they were to decide was computed"


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise unknown(name, value, choices)


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UnicpError(f"{name} must be True or False, got {value!r:.80}")


def check_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple | range):
        raise UnicpError(f"{name} must be a tuple, got {value!r:.80}")
    return tuple(value)


def check_number(name: str, value: Any, *, low: float, high: float = float("inf"), whole: bool = False) -> None:
    """Refuse what is not a number in [low, high]; booleans and NaN are not numbers here."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        limits = f"from {low:g} to {high:g}" if high != float("inf") else f"of at least {low:g}"
        raise UnicpError(f"{name} must be {kind} {limits}, got {value!r:.80}")
