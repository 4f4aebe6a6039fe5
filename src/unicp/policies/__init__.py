"""Policies decide when to compute: pure state machines over scalars, testable without a model.

A policy is found by the type of its config. A new policy is one new module in this package, with a frozen config
dataclass and a :class:`Policy` decorated with ``@register``. The command line, the contract tests and the documentation
enumerate :func:`config_types`.
"""

from __future__ import annotations

from .base import ACTIONS, UNIT_ACTIONS, Decision, Needs, Policy, Step, no_numbers
from .config import (
    Config,
    check_choice,
    check_flag,
    check_number,
    check_tuple,
    config_from_dict,
    config_types,
    make_policy,
    register,
)

__all__ = [
    "ACTIONS",
    "UNIT_ACTIONS",
    "Config",
    "Needs",
    "Decision",
    "Policy",
    "Step",
    "check_choice",
    "check_flag",
    "check_number",
    "check_tuple",
    "config_from_dict",
    "config_types",
    "make_policy",
    "no_numbers",
    "register",
]
