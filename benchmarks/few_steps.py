"""From how many computed steps on forecasts are better than even steps, leaving one family out.

    python -m benchmarks.few_steps [--members ltx open-sora] [--prompts 8]

``K`` of ``N`` steps are computed: evenly, as fewer steps would be (outputs are repeated, or the solver takes longer
steps where it can), or over growing gaps, with forecasts between them. Both are the default plan, with the constant
that decides between them set to one side of ``K`` or the other. Captions of the training side, each against the
unaccelerated video; under Euler, or under DDIM and UniPC with two denoisers, which are those models' own.

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
EVEN, FORECAST = "even", "forecast"
CONSTANTS = (
    "MIN_COMPUTED_FOR_FORECASTS",
    "MIN_COMPUTED_FOR_FORECASTS_OF_DDIM",
    "MIN_COMPUTED_FOR_FORECASTS_OF_TWO",
)


def measure(member: str, maker: Maker) -> list[dict[str, Any]]:
    """A row for each cell."""
    rows = []
    for steps, computed in CELLS[member]:
        situation = situation_of(member, steps)
        whole, found = maker.plain(situation, steps), {}
        for name, least in ((EVEN, computed + 1), (FORECAST, computed)):
            with patch.multiple(step_plan, **dict.fromkeys(CONSTANTS, least)):
                frames, report = maker.videos(situation, steps, BudgetConfig(target_speedup=steps / computed))
            if report.computed_steps != computed:
                raise SystemExit(f"{member}: {report.computed_steps} of {steps} steps were computed, not {computed}")
            found[name] = psnrs(frames, whole)
        rows.append({"member": member, "steps": steps, "computed": computed, "psnr": found})
        print(member, head(rows[-1]), {name: f"{mean(v):.1f} / {min(v):.1f}" for name, v in found.items()}, flush=True)
    return rows


def head(row: dict[str, Any]) -> str:
    return f"{row['computed']} of {row['steps']}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, a table a solver: what forecasts have over even steps on each member, and in the mean over the others.

    Args:
        rows: as :func:`measure` makes them.
    """
    lines = []
    for solver, members in GROUPS.items():
        found = {}
        for row in rows:
            if row["member"] in members:
                found[row["member"], head(row)] = gain(row["psnr"][EVEN], row["psnr"][FORECAST])
        lines += [*left_out({solver: members}, list(dict.fromkeys(column for _, column in found)), found), ""]
    return lines[:-1]


if __name__ == "__main__":
    run(__doc__, "few_steps", tuple(CELLS), measure, tables)
