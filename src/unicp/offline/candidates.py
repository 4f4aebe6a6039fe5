"""What ``unicp.tune`` tries beside each other: how much of it by effort, which kinds of plans, and how it judges
them. Ours, not a paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnicpError
from ..policies.plans.step_plan import StepPlan, alternating, default, growing
from ..policies.unicp import UniCPConfig
from ..profiles import resolve_config
from .search import Limits, Trajectories, plans

MEASURED = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Costs at which plans are tried for real, as one over the share of computed steps; between them is interpolated."""
CHOICES = (1.5, 2.0, 3.0, 4.0)
"""Costs at which kinds of plans are compared by real runs; between them the nearest one's choice holds."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much a tuning may run.

    Attributes:
        gain_prompts, gain_positions: on how many prompts (1 at least) and at how many steps errors are injected.
        variants: limits of the search, and
        warmups: first steps of even plans (:func:`~unicp.policies.plans.step_plan.growing`; with 2, those at high
            speeds are the default plan), and
        alternating: of those with the conditional branch alone at every second step, where a pipeline calls it alone,
            and of those with UniCP inside there, if it is given (:func:`~unicp.policies.plans.step_plan.alternating`):
            all that are tried for real beside each other.
        speeds: those of :data:`MEASURED` at which plans are tried.
    """

    gain_prompts: int
    gain_positions: int
    variants: tuple[Limits, ...]
    warmups: tuple[int, ...]
    alternating: tuple[int, ...]
    speeds: tuple[float, ...]


EFFORTS = {
    "low": Effort(gain_prompts=1, gain_positions=0, variants=(Limits(),), warmups=(), alternating=(), speeds=CHOICES),
    "medium": Effort(
        gain_prompts=3,
        gain_positions=5,
        variants=(Limits(), Limits(warmup=5), Limits(tempering=0.5)),
        warmups=(3, 5),
        alternating=(3,),
        speeds=MEASURED,
    ),
    "high": Effort(
        gain_prompts=8,
        gain_positions=8,
        variants=tuple(Limits(warmup=w, tempering=t) for w in (2, 3, 5) for t in (0.0, 0.3, 0.6)),
        warmups=(3, 4, 5, 7),
        alternating=(2, 5),
        speeds=MEASURED,
    ),
}


def cost_in_runs(prompts: int, effort: str, inside: bool = False) -> float:
    """About how many runs of the pipeline a tuning takes at most, with plans with UniCP inside steps or without."""
    work = EFFORTS[effort]
    half = (prompts + 1) // 2
    gains = min(work.gain_prompts, half) * work.gain_positions / 2
    kinds = 1 + len(work.variants) + len(work.warmups) + len(work.alternating) * (1 + inside)  # one is the default plan
    # Kinds are compared on one half of the prompts, the plans that are chosen are measured on the other, or on all.
    known = sum(1 / s for s in CHOICES)
    choosing = half * kinds * known
    timing = min(work.gain_prompts, half) / 2 if inside else 0
    return prompts + gains + timing + choosing + prompts * sum(1 / s for s in work.speeds) - half * known


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
