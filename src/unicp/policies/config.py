"""The base of all configs, the registry that finds a policy by the type of its config, and checks of values."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import UnicpError, unknown
from .base import Policy

ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of the public configs, with a JSON round trip and copies with other values."""

    method: ClassVar[str]
    """Name of the method on the command line and in JSON."""
    schedule_only: ClassVar[bool] = False
    """Whether decisions need no measurement inside the blocks, so that the method works on any denoiser."""

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """A copy with other values; unknown names are errors."""
        _check_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """The configs that a comparison tries for this method: by curve and label, from mild to bold.

        Args:
            steps: denoising steps of the run.
        """
        return {cls.method: {"default": cls()}}

    def spread(self) -> dict[str, Config]:
        """Variants of this very config at other costs that a comparison tries, by label; empty for itself alone."""
        return {}

    def shared(self: ConfigT, denoisers: int) -> ConfigT:
        """The config for each of several denoisers of a pipeline: what may be spent once per video is divided."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the method's name under ``"method"``. A profile is represented by its path.

        Raises:
            UnicpError: a profile was never saved.
        """
        return {"method": self.method, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if hasattr(value, "tensors"):
        if value.path is None:
            raise UnicpError("a config that holds a profile can be written down once the profile is saved: save it")
        return value.path
    return value


def _check_keys(kind: type[Config], values: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise unknown(f"field of {kind.__name__}", key, names)


_REGISTRY: dict[type[Config], Callable[[Any], Policy]] = {}
PolicyT = TypeVar("PolicyT", bound=Callable[[Any], Policy])


def register(config_type: type[Config]) -> Callable[[PolicyT], PolicyT]:
    """Class decorator: the decorated policy serves configs of this type. The last one registered for a type counts."""

    def decorate(policy: PolicyT) -> PolicyT:
        _REGISTRY[config_type] = policy
        return policy

    return decorate


def config_types() -> dict[str, type[Config]]:
    """Every config type by the name of its method. It imports all modules of this package."""
    for module in pkgutil.iter_modules([os.path.dirname(__file__)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return {kind.method: kind for kind in _REGISTRY}


def make_policy(config: Config) -> Policy:
    """A new policy for a config.

    Raises:
        UnicpError: no policy is registered for its type.
    """
    config_types()
    for kind in type(config).__mro__:
        if kind in _REGISTRY:
            return _REGISTRY[kind](config)
    raise unknown("config type", type(config).__name__, [kind.__name__ for kind in _REGISTRY])


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that :meth:`Config.to_dict` or its JSON describes.

    Raises:
        UnicpError: the method or a key is unknown, or a value is out of range.

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


def check_number(name: str, value: Any, *, low: float, high: float = math.inf, whole: bool = False) -> None:
    """Refuse a value that is not a number in [low, high]; booleans, NaN and infinity do not count as numbers."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high or value == math.inf:
        kind = "a whole number" if whole else "a number"
        limits = f"from {low:g} to {high:g}" if high != math.inf else f"of at least {low:g}"
        raise UnicpError(f"{name} must be {kind} {limits}, got {value!r:.80}")


def checked_profile(value: Any) -> Any:
    """A profile (:class:`unicp.Profile`) as it is, a path as text."""
    if value is None or hasattr(value, "tensors"):
        return value
    try:
        return os.fspath(value)
    except TypeError:
        raise UnicpError(f"profile must be a Profile or the path of one, got {value!r:.80}") from None
