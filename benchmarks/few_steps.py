"""From how many computed steps on forecasts are better than even steps, leaving one family out.

    python -m benchmarks.few_steps [--members ltx open-sora] [--prompts 8]

``K`` of ``N`` steps are computed: evenly, as fewer steps would be (outputs are repeated, or the solver takes longer
steps where it can), or over growing gaps, with forecasts between them. Both are the default plan, with the constant
that decides between them set to one side of ``K`` or the other. Captions of the training side, each against the
unaccelerated video; under Euler, or under DDIM and UniPC with two denoisers, which are those models' own. Under Euler,
where even steps do not fall on whole ones, the default takes the step before; what the nearest one gives is measured,
too.

A member that was measured before is kept; ``--members`` measures the named ones again.
"""

from __future__ import annotations

from statistics import mean
from typing import Any
from unittest.mock import patch

from benchmarks.first_steps import DDIM, EULER, left_out, run, situation_of
from benchmarks.promise import Maker, gain, psnrs
from unicp import BudgetConfig
from unicp.policies.plans import step_plan

TWO = ("wan-two",)
GROUPS = {"Euler": EULER, "DDIM": DDIM, "UniPC": TWO}
CELLS = {member: ((12, 5), (12, 6), (20, 6), (20, 7), (20, 8), (30, 10)) for member in EULER}
CELLS |= {member: ((12, 5), (12, 6), (20, 8), (20, 9), (20, 10), (30, 10)) for member in DDIM}
CELLS |= {member: ((20, 11), (20, 12), (20, 13), (30, 10), (30, 12), (30, 15)) for member in TWO}
"""Numbers of steps, and of computed ones."""
BETWEEN = ((8, 3), (12, 5), (20, 6))
"""Those under Euler in which even steps do not fall on whole ones, and are what is played by default."""
EVEN, FORECAST, NEAREST = "even", "forecast", "even, the nearest steps"
CONSTANTS = (
    "MIN_COMPUTED_FOR_FORECASTS",
    "MIN_COMPUTED_FOR_FORECASTS_OF_DDIM",
    "MIN_COMPUTED_FOR_FORECASTS_OF_TWO",
)


def measure(member: str, maker: Maker) -> list[dict[str, Any]]:
    """A row for each cell."""
    rows = [
        _row(member, maker, *cell, {EVEN: _deciding(cell[1] + 1), FORECAST: _deciding(cell[1])})
        for cell in CELLS[member]
    ]
    for steps, computed in BETWEEN if member in EULER else ():
        nearest = step_plan.computing(steps, {round(steps / computed * i) for i in range(computed)}, order=0)
        plans = {EVEN: _deciding(computed + 1), NEAREST: patch.object(step_plan, "untuned", return_value=nearest)}
        rows.append(_row(member, maker, steps, computed, plans))
    return rows


def _deciding(least: int) -> Any:
    """Has forecasts from so many computed steps on."""
    return patch.multiple(step_plan, **dict.fromkeys(CONSTANTS, least))


def _row(member: str, maker: Maker, steps: int, computed: int, plans: dict[str, Any]) -> dict[str, Any]:
    situation, found = situation_of(member, steps), {}
    whole = maker.plain(situation, steps)
    for name, change in plans.items():
        with change:
            frames, report = maker.videos(situation, steps, BudgetConfig(target_speedup=steps / computed))
        if report.computed_steps != computed:
            raise SystemExit(f"{member}: {report.computed_steps} of {steps} steps were computed, not {computed}")
        found[name] = psnrs(frames, whole)
    row = {"member": member, "steps": steps, "computed": computed, "psnr": found}
    print(member, head(row), {name: f"{mean(v):.1f} / {min(v):.1f}" for name, v in found.items()}, flush=True)
    return row


def head(row: dict[str, Any]) -> str:
    return f"{row['computed']} of {row['steps']}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: what forecasts have over even steps on each member, and in the mean over the others, a table a solver;
    and what even steps have over the steps nearest to them.

    Args:
        rows: as :func:`measure` makes them.
    """
    lines = []
    for solver, members in GROUPS.items():
        lines += [*_table(rows, solver, members, EVEN, FORECAST), ""]
    return [*lines, *_table(rows, "Euler", EULER, NEAREST, EVEN)]


def _table(rows: list[dict[str, Any]], solver: str, members: tuple[str, ...], before: str, after: str) -> list[str]:
    """What one kind of plan has over another on the members that were measured with both."""
    found = {
        (row["member"], head(row)): gain(row["psnr"][before], row["psnr"][after])
        for row in rows
        if row["member"] in members and {before, after} <= set(row["psnr"])
    }
    return left_out({solver: members}, list(dict.fromkeys(column for _, column in found)), found)


if __name__ == "__main__":
    run(__doc__, "few_steps", tuple(CELLS), measure, tables)
