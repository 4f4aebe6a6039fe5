"""unicp makes video diffusion transformers faster at a quality you choose.

Nothing is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "accelerate": "hosts.diffusers.session",
    "restore": "hosts.diffusers.session",
    "Session": "hosts.diffusers.session",
    "SessionReport": "engine.report",
    "StepRecord": "engine.report",
    "AdaCacheConfig": "policies.adacache",
    "ScheduleConfig": "policies.schedule",
    "UniCPConfig": "policies.unicp",
    "BudgetConfig": "policies.budget",
    "tune": "offline.tune",
    "calibrate": "offline.calibrate",
    "Profile": "profiles",
    "Run": "engine.run",
    "Policy": "policies.base",
    "Step": "policies.base",
    "Decision": "policies.base",
    "Needs": "policies.base",
    "Config": "policies.config",
    "register": "policies.config",
    "compare": "bench.compare",
    "Comparison": "bench.comparison",
    "ModelSpec": "specs",
    "BlockList": "specs",
    "register_spec": "specs",
    "UnicpError": "errors",
    "UnicpWarning": "errors",
}

__all__ = [*_HOMES, "__version__", "demo"]

if TYPE_CHECKING:
    from . import demo as demo
    from .bench.compare import compare as compare
    from .bench.comparison import Comparison as Comparison
    from .engine.report import SessionReport as SessionReport
    from .engine.report import StepRecord as StepRecord
    from .engine.run import Run as Run
    from .errors import UnicpError as UnicpError
    from .errors import UnicpWarning as UnicpWarning
    from .hosts.diffusers.session import Session as Session
    from .hosts.diffusers.session import accelerate as accelerate
    from .hosts.diffusers.session import restore as restore
    from .offline.calibrate import calibrate as calibrate
    from .offline.tune import tune as tune
    from .policies.adacache import AdaCacheConfig as AdaCacheConfig
    from .policies.base import Decision as Decision
    from .policies.base import Needs as Needs
    from .policies.base import Policy as Policy
    from .policies.base import Step as Step
    from .policies.budget import BudgetConfig as BudgetConfig
    from .policies.config import Config as Config
    from .policies.config import register as register
    from .policies.schedule import ScheduleConfig as ScheduleConfig
    from .policies.unicp import UniCPConfig as UniCPConfig
    from .profiles import Profile as Profile
    from .specs import BlockList as BlockList
    from .specs import ModelSpec as ModelSpec
    from .specs import register_spec as register_spec


def __getattr__(name: str) -> Any:
    if name == "demo":
        return importlib.import_module(".demo", __name__)
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
