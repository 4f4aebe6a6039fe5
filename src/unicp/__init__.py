"""unicp makes video diffusion transformers faster at a quality you choose.

Nothing is imported until it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOMES = {
    "accelerate": "session",
    "restore": "session",
    "Session": "session",
    "SessionReport": "report",
    "StepRecord": "report",
    "AdaCacheConfig": "policies.adacache",
    "ScheduleConfig": "policies.schedule",
    "UniCPConfig": "policies.unicp",
    "BudgetConfig": "policies.budget",
    "tune": "tuning",
    "calibrate": "calibration",
    "Profile": "profiles",
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
    from .calibration import calibrate as calibrate
    from .errors import UnicpError as UnicpError
    from .errors import UnicpWarning as UnicpWarning
    from .policies.adacache import AdaCacheConfig as AdaCacheConfig
    from .policies.budget import BudgetConfig as BudgetConfig
    from .policies.schedule import ScheduleConfig as ScheduleConfig
    from .policies.unicp import UniCPConfig as UniCPConfig
    from .profiles import Profile as Profile
    from .report import SessionReport as SessionReport
    from .report import StepRecord as StepRecord
    from .session import Session as Session
    from .session import accelerate as accelerate
    from .session import restore as restore
    from .specs import BlockList as BlockList
    from .specs import ModelSpec as ModelSpec
    from .specs import register_spec as register_spec
    from .tuning import tune as tune


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
