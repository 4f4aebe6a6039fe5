"""What every config has to keep to, on every family: the cases, and the runs that the tests look at.

A new config type is one new entry in ``CASES``; ``test_contract.py`` fails by name on one that has none.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import unicp
from tests.family import STEPS
from tests.tiny import FAMILIES, Family, denoisers
from tests.tiny_variants import VARIANTS
from unicp.engine.report import SessionReport, StepRecord
from unicp.errors import UnicpWarning
from unicp.policies import Config
from unicp.tensors.flops import EXTRA

# Whatever a random model measures lies below the last threshold, so that these always reuse.
CODEBOOK = ((0.02, 4), (1e6, 3))
ALWAYS = ((1.0, 1),)
FEW_STEPS = 4
"""Of runs that want nothing to be kept from step to step."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config that reuses, how to make it compute everything, and what it fills."""

    config: Config
    always: dict[str, Any]
    fills: str  # "stack", "output" or "units"
    profiled: bool = False  # the config wants a profile of the family's pipeline

    @property
    def always_compute(self) -> Config:
        return self.config.replace(**self.always)


def _adacache(fills: str = "stack", **fields: Any) -> Case:
    config = unicp.AdaCacheConfig(codebook=CODEBOOK, **fields)
    return Case(config=config, always={"codebook": ALWAYS}, fills=fills)


def _schedule(fills: str = "output", **fields: Any) -> Case:
    return Case(config=unicp.ScheduleConfig(interval=3, **fields), always={"interval": 1}, fills=fills)


def _budget(**fields: Any) -> Case:
    config = unicp.BudgetConfig(target_speedup=2.0, warmup_steps=2, **fields)
    return Case(config=config, always={"target_speedup": 1.0}, fills="output")


def _unicp(profiled: bool = True, **fields: Any) -> Case:
    paper = {"fill": "reuse", "windows": "unit", "delta_mlp": 0.0, "pcas": True}  # the paper, as we read it
    config = unicp.UniCPConfig(**{**paper, **fields})
    always = {"delta": 0, "delta_cross": 0, "delta_mlp": 0, "delta_prune": 0, "stack": None, "target_speedup": None}
    return Case(config=config, always=always, fills="units", profiled=profiled)


SHARED = {"fill": "forecast", "windows": "shared"}

# Between two steps nothing of a random model changes less than this, so that nothing can be cached and all is sliced.
NO_WINDOWS = {"delta": 1e-6, "delta_prune": 0.9, "max_window": 3}

CASES: dict[str, dict[str, Case]] = {
    "adacache": {
        "residual": _adacache(),
        "forecast": _adacache(fill="forecast", fills="output"),
        "separate-moreg": _adacache(guidance="separate", moreg=True, moreg_strides=(1, 2)),
        "all-mlp": _adacache(metric_location="all", metric_kind="mlp"),
        "start-block": _adacache(metric_location="start", metric_kind="block", moreg=True, moreg_form="paper"),
    },
    "schedule": {
        "reuse": _schedule(),
        "linear": _schedule(fill="linear"),
        "quadratic": _schedule(fill="quadratic", damping=1.0),
        "stack": _schedule(unit="stack", fills="stack"),
    },
    "budget": {
        "default": _budget(),
        "override": _budget(override_reserve=0.3, override_zscore=0.01),
    },
    "unicp": {
        "online": _unicp(profiled=False, delta=0.5, delta_mlp=0.5, max_window=2),
        "windows": _unicp(delta=0.5, delta_mlp=0.5, pcas=False, max_window=3, statistic="max"),
        "shared": _unicp(delta=0.5, delta_mlp=0.4, pcas=False, windows="shared", max_window=3),
        "shared-online": _unicp(profiled=False, delta=0.5, delta_mlp=0.4, windows="shared", max_window=2),
        "forecast": _unicp(profiled=False, delta=9.0, delta_mlp=8.0, **SHARED),
        "forecast-packed": _unicp(profiled=False, delta=9.0, delta_mlp=8.0, storage="int8", **SHARED),
        "forecast-profiled": _unicp(delta=0.5, delta_mlp=0.4, pcas=False, max_window=3, **SHARED),
        "forecast-block": _unicp(profiled=False, delta=9.0, delta_mlp=8.0, fill="forecast", windows="block"),
        "forecast-unit": _unicp(profiled=False, delta=9.0, delta_mlp=8.0, fill="forecast"),
        "target": _unicp(profiled=False, delta_mlp=None, target_speedup=1.4, **SHARED),
        "target-profiled": _unicp(delta_mlp=None, target_speedup=3.0, delta_prune=0.9, **SHARED),
        "switch": _unicp(**NO_WINDOWS),
        "off": _unicp(dws="off", delta=0.5, delta_prune=0.9, max_window=2),
        "refreshed": _unicp(refresh_from_sliced=True, delta=0.5, delta_prune=0.9, max_window=2),
        "maps": _unicp(profiled=False, delta=0.3, map_level=True, max_window=1),
        "in-adacache": _unicp(stack=unicp.AdaCacheConfig(codebook=CODEBOOK), delta=0.5, max_window=2),
        "in-schedule": _unicp(
            stack=unicp.ScheduleConfig(interval=2, fill="linear"), delta=0.5, edcw="online", max_window=5
        ),
    },
}
"""Cases by method and name: every option that changes what the engine does is in one of them."""

FULL = ("wan2.2", "latte", "hunyuan-video")
"""Families that ``make test`` runs every test for, while the cases take turns on them: those that differ most.

Two denoisers whose branches are called apart; spatial and temporal blocks in turns, of which one takes what the other
one left in another layout, and one call for both branches; two lists of blocks with two streams, of which one is kept.
"""


PRIMARY = [
    pytest.param(name, marks=() if name in FULL else pytest.mark.slow)
    for name, family in FAMILIES.items()
    if family.primary
]
"""Families that every case and every test is run for; quick are :data:`FULL`."""

_AGAIN = {family.name for family in VARIANTS}
ONCE = [pytest.param(name, marks=pytest.mark.slow if name in _AGAIN else ()) for name in FAMILIES]
"""All families; other pipelines of a transformer that is tried in its first one are left to ``make test-slow``."""
FEWER = [pytest.param(name, marks=() if family.primary else pytest.mark.slow) for name, family in FAMILIES.items()]
"""All families; quick are the primary ones, for tests of what hardly differs between the others."""
OTHERS = [
    pytest.param(name, marks=() if family.primary or len(family.denoisers) > 1 else pytest.mark.slow)
    for name, family in FAMILIES.items()
    if name not in FULL
]
"""All but :data:`FULL`, likewise; quick are those of two denoisers too."""

# For the other families: one case of each kind of filling, and one each for units that are kept and that are sliced.
SOME = ("adacache-residual", "schedule-linear", "unicp-online", "unicp-switch")
# And for the rest of the primary ones, what their specs say of where to measure, and corrected forecasts.
MEASURED = ("adacache-all-mlp", "adacache-start-block", "budget-override")


def all_cases_of(family: str) -> list[str]:
    """Names of the cases that mean something on a family."""
    names = [f"{method}-{name}" for method, cases in CASES.items() for name in cases]
    # With nothing to slice, what acts by slicing alone never acts.
    slices = FAMILIES[family].slices
    return [name for name in names if slices or case(name).fills != "units" or case(name).config.delta > 1e-3]


def cases_of(family: str) -> list[str]:
    """All of them on a primary family, some on another one: what ``unicp models`` calls tested."""
    return [name for name in all_cases_of(family) if FAMILIES[family].primary or name in SOME]


def quick_cases_of(family: str) -> list[str]:
    """Those that the contract is run for whenever tests are; the others are run by ``make test-slow``."""
    if family in _AGAIN:  # another pipeline of a transformer: its units are where they were
        return ["adacache-residual"]
    names = all_cases_of(family)
    if family in FULL:
        chosen = {*SOME, *_share([name for name in names if name not in SOME], family, FULL)}
    else:
        firsts = [name for name in FAMILIES if name not in _AGAIN]
        chosen = {"adacache-residual", ("unicp-switch", "unicp-online")[firsts.index(family) % 2]}
        if FAMILIES[family].primary:
            others = [name for name in firsts if FAMILIES[name].primary and name not in FULL]
            chosen |= {*_share([*SOME, *MEASURED], family, others)}
    return [name for name in names if name in chosen]


def _share(names: Sequence[str], family: str, families: Sequence[str]) -> Sequence[str]:
    """A family's share of names that take turns on families."""
    return names[families.index(family) :: len(families)]


def covering(*axes: Iterable[str]) -> list[Any]:
    """Parameters of a test for all combinations of values: quick are so few that each value is in one, the rest slow.

    For values that have little to do with each other.
    """
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    chosen: set[tuple[str, ...]] = set()
    turn = itertools.count()
    while any({each[place] for each in chosen} < set(axis) for place, axis in enumerate(values)):
        at = rest = next(turn)
        picked = []
        for axis in values:  # the longest goes round at each turn, the others count as digits do
            place, rest = (at % longest, rest) if len(axis) == longest else (rest % len(axis), rest // len(axis))
            picked.append(axis[place])
        chosen.add(tuple(picked))
    return [
        pytest.param(*each, marks=() if each in chosen else pytest.mark.slow, id="-".join(each))
        for each in itertools.product(*values)
    ]


# One of each kind of filling, for the tests whose subject is the engine and not the config.
FEW = ("adacache-residual", "adacache-forecast", "schedule-linear")
_FEW = dict(zip(FULL, FEW, strict=True))
FEW_PAIRS = [
    pytest.param(family, name, marks=() if _FEW.get(family) == name else pytest.mark.slow, id=f"{family}-{name}")
    for family in FAMILIES
    for name in FEW
    if FAMILIES[family].primary
]
"""Each filling on each primary family; quick is each once, on one of :data:`FULL`."""


def case(name: str) -> Case:
    method, _, rest = name.partition("-")
    return CASES[method][rest]


PAIRS = [(family, name) for family in FAMILIES for name in quick_cases_of(family)]
"""What the contract is run for: families and cases, by name."""
SLOW_PAIRS = [
    (family, name) for family in FAMILIES for name in all_cases_of(family) if name not in quick_cases_of(family)
]


@functools.cache
def _calibrated(family: str) -> tuple[Any, str]:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    config = unicp.UniCPConfig(delta=0.5, delta_prune=0.9, fill="reuse", windows="unit", delta_mlp=0.0, pcas=True)
    steps = STEPS if chosen.primary or len(chosen.denoisers) > 1 else FEW_STEPS
    profile = chosen.run(
        pipe, lambda run, **call: unicp.calibrate(run, None, config=config, progress=False, **call), steps=steps
    )
    path = Path(tempfile.mkdtemp()) / f"{family}.safetensors"
    profile.save(path)
    return pipe, str(path)


def calibrated(family: str) -> Any:
    """A pipeline of the family that was calibrated, and not used since."""
    return _calibrated(family)[0]


def profile_of(family: str) -> str:
    """Path of a profile of the family's pipeline."""
    return _calibrated(family)[1]


def config_on(family: str, name: str) -> Config:
    """The config of a case, with a profile of this family where it wants one."""
    chosen = case(name)
    return chosen.config.replace(profile=profile_of(family)) if chosen.profiled else chosen.config


@functools.cache
def plain(family: str, **request: Any) -> torch.Tensor:
    """What the pipeline makes without unicp."""
    return FAMILIES[family].generate(FAMILIES[family].build(), **request)


@functools.cache
def fresh(family: str, name: str, **request: Any) -> tuple[torch.Tensor, tuple[tuple[Any, ...], ...]]:
    """What a new pipeline makes in its first run under a case: latents and actions."""
    pipe = FAMILIES[family].build()
    session = unicp.accelerate(pipe, config_on(family, name))
    latents = quietly(lambda: FAMILIES[family].generate(pipe, **request))
    return latents, actions(session.report())


def quietly(run: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicpWarning)
        return run()


def actions(report: SessionReport) -> tuple[tuple[Any, ...], ...]:
    """Everything a report says that must be the same again."""
    return tuple(
        (r.denoiser, r.index, r.branch, r.action, r.sigma, r.metric, r.motion, tuple(r.units.items()))
        for r in report.steps
    )


def computed(report: SessionReport, denoiser: str | None = None) -> list[StepRecord]:
    """Records of the calls in which the denoiser ran, wholly or in part."""
    return [r for r in report.steps if r.action in ("compute", "partial") and denoiser in (None, r.denoiser)]


def traces(module: torch.nn.Module) -> dict[str, Any]:
    """Everything on a module and its children that somebody might have left there."""
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        found[f"{name}.forward"] = child.__dict__.get("forward")
        registry = child.__dict__.get("_diffusers_hook")
        found[f"{name}.registry"] = sorted(registry.hooks) if registry is not None else []
        # diffusers itself puts an empty registry there at the first cache_context.
        found[f"{name}.attributes"] = sorted(child.__dict__.keys() - {"_diffusers_hook"})
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_state_dict_hooks"):
            found[f"{name}.{kind}"] = len(child.__dict__[kind])
        found[f"{name}.class"] = type(child).__dict__.get("forward")
    return found


@contextmanager
def counting(modules: list[torch.nn.Module]) -> Iterator[list[int]]:
    """How often each module really ran, by ordinary torch hooks."""
    counts = [0] * len(modules)

    def count(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[place] += 1

        return hook

    handles = [module.register_forward_hook(count(place)) for place, module in enumerate(modules)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@dataclass(kw_only=True)
class Runs:
    """Runs of one pipeline: two under a case; one restored and one that computes everything, both of few steps."""

    family: Family
    case: Case
    first: torch.Tensor
    second: torch.Tensor
    reports: list[SessionReport]
    blocks: dict[str, dict[str, int]]  # by denoiser and name: how often each self-attention ran in the first run
    entrance: dict[str, int]  # calls of the first submodule in the first run, by denoiser
    operations: int  # of the denoisers in the first run, by torch's own counter
    restored: torch.Tensor
    before: dict[str, Any]
    after: dict[str, Any]
    always: torch.Tensor
    always_report: SessionReport
    acting_warnings: list[str] = field(default_factory=list)


class _Kernels(TorchDispatchMode):
    """Counts by the formulas of torch's own counter, without its account of modules, which costs as much as the run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping=EXTRA).flop_registry
        self._known: dict[Any, int] = {}  # formulas take longer than what they count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            shapes = [tuple(arg.shape) if isinstance(arg, torch.Tensor) else repr(arg) for arg in args]
            key = (func, *shapes, repr(kwargs))
            if key not in self._known:
                self._known[key] = formula(*args, **(kwargs or {}), out_val=output)
            self.total += self._known[key]
        return output


@contextmanager
def operations(modules: list[torch.nn.Module]) -> Iterator[list[int]]:
    """Floating-point operations inside of the calls of these modules, as torch itself counts them."""
    counter, found, before = _Kernels(), [0], [0]

    def enter(*_: Any) -> None:
        before[0] = counter.total

    def leave(*_: Any) -> None:
        found[0] += counter.total - before[0]

    handles = [
        handle for m in modules for handle in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
    ]
    try:
        with counter:
            yield found
    finally:
        for handle in handles:
            handle.remove()


@functools.lru_cache(maxsize=4)  # a long list of them makes each collection of garbage slow
def runs(family_name: str, case_name: str) -> Runs:
    family, chosen = FAMILIES[family_name], case(case_name)
    pipe = family.build()
    before = {name: traces(getattr(pipe, name)) for name in family.denoisers}
    blocks: dict[str, dict[str, int]] = {}
    entrance: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = unicp.accelerate(pipe, config_on(family_name, case_name))
        watched = []
        for name, denoiser in zip(family.denoisers, denoisers(family, pipe), strict=True):
            paths = {module: path for path, module in denoiser.named_modules()}
            watched.append((name, "", denoiser.get_submodule(family.entrance)))
            # Its first projection: the module itself is called even where a hook stands in for its forward.
            attention = [block.get_submodule(family.attention) for block in family.blocks(denoiser)]
            watched += [(name, paths[module], getattr(module, family.query)) for module in attention]
        with counting([part for *_, part in watched]) as counts, operations(denoisers(family, pipe)) as ran:
            first = family.generate(pipe)
        for (name, path, _), number in zip(watched, counts, strict=True):
            blocks.setdefault(name, {})[path] = number
        for name, numbers in blocks.items():
            entrance[name] = numbers.pop("")
        second = family.generate(pipe)
        reports = session.reports
    session.restore()
    after = {name: traces(getattr(pipe, name)) for name in family.denoisers}
    restored = family.generate(pipe, steps=FEW_STEPS)
    session = unicp.accelerate(pipe, chosen.always_compute)
    always = quietly(lambda: family.generate(pipe, steps=FEW_STEPS))
    return Runs(
        family=family,
        case=chosen,
        first=first,
        second=second,
        reports=reports,
        blocks=blocks,
        entrance=entrance,
        operations=ran[0],
        restored=restored,
        before=before,
        after=after,
        always=always,
        always_report=quietly(session.report),
        acting_warnings=[str(w.message) for w in caught if issubclass(w.category, UnicpWarning)],
    )
