"""How much a tuning may run, by name, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from .planning import Limits

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
        warmups: first steps of even plans (:func:`~unicp.step_plans.growing`; with 2, those at high speeds are the
            default plan), and
        alternating: of those with the conditional branch alone at every second step, where a pipeline calls it alone,
            and of those with UniCP inside there, if it is given (:func:`~unicp.step_plans.alternating`): all that are
            tried for real beside each other.
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
