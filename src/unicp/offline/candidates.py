"""The kinds of plans that ``unicp.tune`` compares, by effort, and how it ranks them. They are ours, not a paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnicpError
from ..policies.plans.step_plan import StepPlan, alternating, growing
from ..policies.unicp import UniCPConfig
from ..profiles import resolve_config
from .search import Limits, Trajectories, plans

MEASURED_SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Costs at which plans are run for real, as one over the share of computed steps; between them, tune interpolates."""
CHOICE_SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
"""Costs at which kinds of plans are compared by real runs; at other costs the nearest one's choice holds."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many runs a tuning may make. Each entry of ``variants``, ``warmups`` and ``alternating`` is a kind of plan.

    Attributes:
        gain_prompts, gain_positions: number of prompts (at least 1) and of steps at which errors are injected.
        variants: limits of the search.
        warmups: numbers of first steps of plans whose gaps grow (:func:`~unicp.policies.plans.step_plan.growing`).
        alternating: numbers of first steps of plans with the conditional branch alone at every second step, if a
            pipeline calls it alone, and of plans with UniCP inside there, if it is given
            (:func:`~unicp.policies.plans.step_plan.alternating`).
        speeds: entries of :data:`MEASURED_SPEEDUPS` at which plans are run.
    """

    gain_prompts: int
    gain_positions: int
    variants: tuple[Limits, ...]
    warmups: tuple[int, ...]
    alternating: tuple[int, ...]
    speeds: tuple[float, ...]


EFFORTS = {
    "low": Effort(
        gain_prompts=1, gain_positions=0, variants=(Limits(),), warmups=(2, 5), alternating=(), speeds=CHOICE_SPEEDUPS
    ),
    "medium": Effort(
        gain_prompts=3,
        gain_positions=5,
        variants=(Limits(), Limits(warmup=5), Limits(tempering=0.5)),
        warmups=(2, 5),
        alternating=(3,),
        speeds=MEASURED_SPEEDUPS,
    ),
    "high": Effort(
        gain_prompts=8,
        gain_positions=8,
        variants=tuple(Limits(warmup=w, tempering=t) for w in (2, 3, 5) for t in (0.0, 0.3, 0.6)),
        warmups=(2, 3, 5, 7),
        alternating=(2, 5),
        speeds=MEASURED_SPEEDUPS,
    ),
}


def cost_in_runs(prompts: int, effort: str, inside: bool = False) -> float:
    """About how many runs of the pipeline a tuning takes at most.

    Args:
        prompts: number of prompts.
        effort: a key of :data:`EFFORTS`.
        inside: whether plans with UniCP inside steps are tried.
    """
    work = EFFORTS[effort]
    half = (prompts + 1) // 2
    gains = min(work.gain_prompts, half) * work.gain_positions / 2
    kinds = 1 + len(work.variants) + len(work.warmups) + len(work.alternating) * (1 + inside)  # one is the default plan
    # Kinds are compared on one half of the prompts; the chosen plans are measured on the other half, or on all.
    known = sum(1 / s for s in CHOICE_SPEEDUPS)
    choosing = half * kinds * known
    timing = min(work.gain_prompts, half) / 2 if inside else 0
    usual = 0.5  # the run that shows what the default plan is
    return usual + prompts + gains + timing + choosing + prompts * sum(1 / s for s in work.speeds) - half * known


DEFAULT_KIND = "default"
"""Name of the kind that is the default plan."""


def kinds(
    trajectories: Trajectories,
    effort: Effort,
    usual: dict[int, StepPlan],
    *,
    apart: bool,
    inside_cost: float = 1.0,
) -> dict[str, dict[int, StepPlan]]:
    """Plans by the name of their kind and their cost in steps.

    Args:
        trajectories: unaccelerated runs, for the search.
        effort: says which kinds there are.
        usual: the default plan at every cost in steps.
        apart: whether the pipeline calls the guidance branches one by one, so that the conditional one can run alone.
        inside_cost: cost of a step with UniCP inside as a share of a whole one; with 1 there are no such plans.
    """
    count = trajectories.steps
    found = {
        f"search, warmup {limits.warmup}, tempering {limits.tempering:g}": plans(trajectories, limits)
        for limits in effort.variants
    }
    found[DEFAULT_KIND] = usual
    for warmup in effort.warmups:
        found[f"growing, warmup {warmup}"] = {n: growing(count, n, warmup) for n in range(warmup + 2, count)}
    ways: dict[str, float | None] = {"conditional branch alone at every second": None} if apart else {}
    if inside_cost < 1:
        ways["UniCP inside at every second"] = inside_cost
    for name, cost in ways.items():
        for warmup in effort.alternating:
            made = {n: alternating(count, n, warmup, inside_cost=cost) for n in range(warmup + 2, count)}
            # There are none beyond the cost at which all steps are computed, half of them for less.
            found[f"{name}, warmup {warmup}"] = {n: plan for n, plan in made.items() if plan.cost * count > n - 1}
    return {name: made for name, made in found.items() if made}  # in short runs, some kinds have no plan


def ranked(scores: dict[str, list[float]]) -> list[str]:
    """Kinds of plans, best first.

    On one prompt a plan may be ten dB ahead of another, and on the next as far behind. So only a kind that is better by
    two standard errors of the prompts' differences ranks before the default plan: the best of many is easily just the
    luckiest.

    Args:
        scores: loss of every prompt under each kind; smaller is better.
    """
    usual = scores.get(DEFAULT_KIND)

    def key(name: str) -> tuple[int, float]:
        mean = float(np.mean(scores[name]))
        if usual is None or name == DEFAULT_KIND:
            return 1, mean
        ahead = np.subtract(usual, scores[name])
        doubt = 2 * float(np.std(ahead, ddof=1)) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
        return 0 if ahead.mean() > doubt else 2, mean

    return sorted(scores, key=key)


def acting_inside(inside: Any, effort: str) -> UniCPConfig:
    """The config that is to act inside computed steps.

    Raises:
        UnicpError: it is not a UniCP, it is stacked on another method, or the effort tries no such plans.
    """
    if not EFFORTS[effort].alternating:
        raise UnicpError(f'effort="{effort}" tries no plans with UniCP inside; take "medium", or leave inside out')
    config = resolve_config(inside)
    if not isinstance(config, UniCPConfig) or config.stack is not None:
        raise UnicpError(f"inside must be a UniCPConfig without a stack, or a profile of one, got {inside!r:.80}")
    return config
