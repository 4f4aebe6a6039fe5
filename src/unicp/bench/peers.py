"""The methods that can be compared: ours, fewer steps, and one small class for each peer. Each gives a curve over its
knob.

A new peer is one class with ``@register``, by which the command line, the report and the tests find it.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import UnicpError, unknown
from ..policies.config import Config, config_types
from ..profiles import content_of, resolve_config
from .harness import denoisers_of, step_count
from .source import code_version

Call = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as a peer sees it.

    Attributes:
        pipe: a fresh pipeline.
        call: arguments that it will be called with.
        calibrated: result of the peer's calibration, if it calibrates.
        reports: functions that return the run's report.
    """

    pipe: Any
    call: Call
    calibrated: Any = None
    reports: list[Callable[[], Any]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return step_count(self.pipe, self.call)

    @property
    def denoisers(self) -> list[Any]:
        return list(denoisers_of(self.pipe).values())


class Peer(abc.ABC):
    """One method of the comparison, drawn as one curve over its main knob.

    Attributes:
        name: name by which it is asked for.
        source: whose code runs.
        library: the installed package whose version belongs to the results.
        knob: name of the setting that the curve varies.
        grid: default values of the knob, mild to bold; ``values`` are those in use.
        note: what a reader has to know about it.
        ours: whether it is a method of unicp.
        calibrates: whether :meth:`calibrate` has to run first.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    library: ClassVar[str] = "diffusers"
    knob: ClassVar[str]
    grid: ClassVar[tuple[Any, ...]]
    note: ClassVar[str] = ""
    ours: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False

    def __init__(self, values: Sequence[Any] | None = None) -> None:
        self.values = tuple(values or self.grid)

    def labels(self, steps: int) -> tuple[str, ...]:
        """One label for each point of the curve; ``steps`` is the run's number of denoising steps."""
        return tuple(f"{self.knob}={value}" for value in self.values)

    def settings(self, label: str) -> dict[str, Any]:
        """The settings that identify the results of a point: everything that changes them."""
        return {"setting": label}

    def value(self, label: str) -> Any:
        by_label = {f"{self.knob}={value}": value for value in self.values}
        return by_label[label]

    def calibrate(self, run: Run, generate: Callable[[Any, Call], Any]) -> Any:
        """Measure plain values beforehand, on a pipeline of its own; every run gets them as ``run.calibrated``."""
        return None

    @abc.abstractmethod
    def apply(self, run: Run, label: str) -> Call:
        """Put the method on the run's pipeline. Returns the arguments to call the pipeline with.

        Raises:
            Exception: any error of a peer that does not apply; it is shown as that peer's result.
        """

    def remove(self, run: Run) -> None:  # noqa: B027
        """Take off what the method put outside the run's pipeline; the pipeline itself is not used again."""

    def report(self, run: Run) -> Any:
        """A ``SessionReport``, if the method gives one; else ``None``."""
        return None

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"


class Ours(Peer):
    """A method of unicp, as configs by label."""

    source = "unicp"
    library = "unicp"
    knob = "config"
    grid = ()
    ours = True

    def __init__(self, name: str, configs: Mapping[str, Config] | Callable[[int], Mapping[str, Config]]) -> None:
        super().__init__()
        self.name: str = name  # type: ignore[misc]
        self._made = configs
        self._configs: Mapping[str, Config] = configs if isinstance(configs, Mapping) else {}

    def labels(self, steps: int) -> tuple[str, ...]:
        if callable(self._made):
            self._configs = self._made(steps)
        return tuple(self._configs)

    def settings(self, label: str) -> dict[str, Any]:
        return {"setting": label, **content_of(self._configs[label])}

    def version(self) -> str:
        return code_version("methods")

    def apply(self, run: Run, label: str) -> Call:
        from ..hosts.diffusers.session import accelerate

        run.reports.append(accelerate(run.pipe, self._configs[label]).report)
        return run.call

    def report(self, run: Run) -> Any:
        return run.reports[-1]()


_PEERS: dict[str, type[Peer]] = {}


def register(kind: type[Peer]) -> type[Peer]:
    """Class decorator that makes a peer known by its name."""
    _PEERS[kind.name] = kind
    return kind


HOMES = ("diffusers_peers", "cachedit_peers")
"""Modules of this package that register peers of other libraries."""


def known() -> dict[str, Callable[[], Peer]]:
    """All methods that can be compared, by name: our curves first, then the peers."""
    for home in HOMES:
        importlib.import_module(f"{__package__}.{home}")
    found: dict[str, Callable[[], Peer]] = {}
    for kind in config_types().values():
        for name in kind.curves(50):
            found[name] = lambda name=name, kind=kind: Ours(name, lambda steps: kind.curves(steps)[name])  # type: ignore[misc]
    return {**found, **_PEERS}


def resolve(asked: Any) -> list[Peer]:
    """The curves that a caller asks for.

    Args:
        asked: names (``"first-block-cache"``, or with values of its knob ``"first-block-cache=0.05:0.1"``), config
            objects, paths of profiles and :class:`Peer` objects; or a mapping from labels to configs; or ``None`` for
            all that are known.

    Raises:
        UnicpError: a name is unknown or asked for twice, or there is nothing to compare.
    """
    peers = known()
    if asked is None:
        return [make() for make in peers.values()]
    if isinstance(asked, Mapping):
        return [Ours(str(name), {_label(config): config}) for name, config in asked.items()]
    if isinstance(asked, str | Config | Peer):
        asked = [asked]
    found = [_one(item, peers) for item in asked]
    names = [peer.name for peer in found]
    if not found:
        raise UnicpError(f"nothing to compare; known: {', '.join(peers)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UnicpError(f"{twice} is asked for twice; name configs apart with a mapping: {{'mild': ..., 'bold': ...}}")
    return found


def _one(item: Any, peers: Mapping[str, Callable[[], Peer]]) -> Peer:
    if isinstance(item, Peer):
        return item
    if isinstance(item, Config):
        return Ours(item.method, {_label(item): item})
    text = str(item)
    if text.endswith(".safetensors"):
        config = resolve_config(text)
        return Ours(text.rpartition("/")[2].removesuffix(".safetensors"), config.spread() or {_label(config): config})
    name, equals, values = text.partition("=")
    if name not in peers:
        raise unknown("method", name, [*peers, "PROFILE.safetensors"])
    peer = peers[name]()
    if not equals:
        return peer
    if peer.ours:
        raise UnicpError(f"{name}= takes no values here; give config objects to unicp.compare, or a profile")
    try:
        return type(peer)([float(value) if "." in value else int(value) for value in values.split(":")])
    except ValueError:
        raise UnicpError(f"{name}={values}: give numbers for its {peer.knob}, as in {name}={peer.grid[0]}") from None


def _label(config: Config) -> str:
    """A short label of a config: the fields that differ from their defaults."""
    changed = []
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if value != entry.default:
            text = str(value)
            changed.append(f"{entry.name}={text if len(text) <= 24 else text[:21] + '...'}")
    return ", ".join(changed) or "default"


@register
class FewerSteps(Peer):
    """The unaccelerated pipeline with fewer steps, which a method has to beat."""

    name = "fewer-steps"
    source = "the pipeline's own scheduler"
    knob = "steps"
    grid = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2)
    note = "No method at all: the same pipeline asked for fewer steps."

    def labels(self, steps: int) -> tuple[str, ...]:
        """Values below 1 are shares of the run's steps."""
        counts = [max(1, round(value * steps)) if value < 1 else int(value) for value in self.values]
        return tuple(f"steps={count}" for count in dict.fromkeys(counts) if count < steps)

    def apply(self, run: Run, label: str) -> Call:
        return {**run.call, "num_inference_steps": int(label.partition("=")[2])}


@register
class Control(Peer):
    """The unaccelerated pipeline once more; how far its speed-up is from 1 shows the noise of the timing."""

    name = "control"
    source = "the pipeline itself"
    knob = "run"
    grid = ("again",)
    note = (
        "The unaccelerated pipeline once more, measured like a method. Its videos have to be identical; how far its "
        "speed-up is from 1 tells how wrong the others can be."
    )

    def apply(self, run: Run, label: str) -> Call:
        return run.call
