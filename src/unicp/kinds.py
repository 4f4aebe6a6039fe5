"""The kinds of plans that ``unicp.tune`` tries beside each other, and how it judges them. Ours, not a paper's."""

from __future__ import annotations

from typing import Any

import numpy as np

from .efforts import EFFORTS, Effort
from .errors import UnicpError
from .planning import Trajectories, plans
from .policies.unicp import UniCPConfig
from .session import resolve_config
from .step_plans import StepPlan, alternating, default, growing

DEFAULT = "default"


def kinds(
    trajectories: Trajectories, effort: Effort, *, apart: bool, inside_cost: float = 1.0
) -> dict[str, dict[int, StepPlan]]:
    """Plans at every cost in steps, by name of their kind.

    Args:
        trajectories: unaccelerated runs, for those that are searched.
        effort: which ones.
        apart: the pipeline calls the guidance branches apart, so that the conditional one can run alone.
        inside_cost: of a step with UniCP inside, as a share of a whole one; with 1 there are no such plans.
    """
    count = trajectories.steps
    found = {
        f"search, warmup {limits.warmup}, tempering {limits.tempering:g}": plans(trajectories, limits)
        for limits in effort.variants
    }
    found[DEFAULT] = {number: default(count, number) for number in range(3, count)}
    for warmup in effort.warmups:
        found[f"even, warmup {warmup}"] = {n: growing(count, n, warmup) for n in range(warmup + 2, count)}
    ways: dict[str, float | None] = {"conditional branch alone at every second": None} if apart else {}
    if inside_cost < 1:
        ways["UniCP inside at every second"] = inside_cost
    for name, cost in ways.items():
        for warmup in effort.alternating:
            made = {n: alternating(count, n, warmup, inside_cost=cost) for n in range(warmup + 2, count)}
            # They end where all steps are computed, half of them for less.
            found[f"{name}, warmup {warmup}"] = {n: plan for n, plan in made.items() if plan.cost * count > n - 1}
    return {name: made for name, made in found.items() if made}  # of few steps, some would compute all


def ranked(scores: dict[str, list[float]]) -> list[str]:
    """Kinds of plans by what every prompt lost with them, best first.

    On one prompt a plan may be ten dB ahead of another, on the next as far behind. So the default plan loses its place
    only to what is better by two standard errors of the prompts' differences: the best of many is easily the luckiest.
    """
    usual = scores.get(DEFAULT)

    def key(name: str) -> tuple[int, float]:
        mean = float(np.mean(scores[name]))
        if usual is None or name == DEFAULT:
            return 1, mean
        ahead = np.subtract(usual, scores[name])
        doubt = 2 * float(np.std(ahead, ddof=1)) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
        return 0 if ahead.mean() > doubt else 2, mean

    return sorted(scores, key=key)


def acting_inside(inside: Any, effort: str) -> UniCPConfig:
    """What is to act inside computed steps.

    Raises:
        UnicpError: it is no UniCP, or stacked on another method, or the effort tries no such plans.
    """
    if not EFFORTS[effort].alternating:
        raise UnicpError(f'effort="{effort}" tries no plans with UniCP inside; take "medium", or leave inside out')
    config = resolve_config(inside)
    if not isinstance(config, UniCPConfig) or config.stack is not None:
        raise UnicpError(f"inside must be a UniCPConfig without a stack, or a profile of one, got {inside!r:.80}")
    return config
