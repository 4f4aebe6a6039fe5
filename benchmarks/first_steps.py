"""How many first and last steps to compute where the solver takes each step: two rules, leaving one family out.

    python -m benchmarks.first_steps [--members ltx open-sora] [--prompts 8]

``K`` of ``N = 50`` steps are computed: the first ``K^2 / 2N`` and the last one, or the first ``K - 2.08 sqrt(N)``, as
under multistep solvers, and the last one to three; between them gaps grow. Captions of the training side, each against
the unaccelerated video; under Euler, and under DDIM where that is the model's own. Both compute equally many steps.

A member that was measured before is kept; ``--members`` measures the named ones again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch

from benchmarks import common, figures
from benchmarks.promise import Maker, Situation, gain, psnrs
from unicp import BudgetConfig
from unicp.policies.plans.step_plan import first_steps

STEPS = 50
SPEEDS = (1.5, 1.75, 2.0, 2.5)
EULER, DDIM = ("demo", "hunyuan", "ltx", "open-sora"), ("cogvideox", "latte")
SHARE, ROOT = "first K²/2N, last 1", "first K − 2.08 √N, last 1 to 3"


class OwnScheduler(Situation):
    """A member of the proving ground under its own scheduler."""

    def make(self, kinds: dict[str, Any]) -> Any:
        return kinds[self.member].scheduler


def situation_of(member: str, steps: int) -> Situation:
    """A member under Euler, or under its own scheduler if it is none of :data:`EULER`."""
    kind = Situation if member in EULER else OwnScheduler
    return kind("euler", steps, member="" if member == "demo" else member)


def rules(computed: int) -> dict[str, BudgetConfig]:
    """Both rules, for so many computed steps."""
    asked = BudgetConfig(target_speedup=STEPS / computed)
    first = first_steps(STEPS, computed, 2)
    return {
        SHARE: asked.replace(warmup_steps=max(1, round(computed**2 / (2 * STEPS))), cooldown_steps=1),
        ROOT: asked.replace(warmup_steps=first, cooldown_steps=max(1, min(3, first - 3))),
    }


def measure(member: str, maker: Maker) -> list[dict[str, Any]]:
    """A row for each speed."""
    situation = situation_of(member, STEPS)
    whole, rows = maker.plain(situation, STEPS), []
    for speed in SPEEDS:
        found = {}
        for name, config in rules(math.floor(STEPS / speed)).items():
            found[name] = psnrs(maker.videos(situation, STEPS, config)[0], whole)
        rows.append({"member": member, "speed": speed, "psnr": found})
        print(member, f"{speed:g}x", {name: f"{mean(v):.1f} / {min(v):.1f}" for name, v in found.items()}, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: what the second rule has over the first on each member, and in the mean over the others."""
    found = {(row["member"], f"{row['speed']:g}x"): gain(row["psnr"][SHARE], row["psnr"][ROOT]) for row in rows}
    return left_out({"Euler": EULER, "DDIM": DDIM}, [f"{speed:g}x" for speed in SPEEDS], found)


def left_out(
    groups: dict[str, tuple[str, ...]], columns: list[str], found: dict[tuple[str, str], tuple[float, float]]
) -> list[str]:
    """Markdown: the gain of each member, in the mean and in the worst caption, and that of the others of its group.

    Args:
        groups: members by solver.
        columns: heads of the columns.
        found: gains by member and column.
    """
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for solver, members in groups.items():
        for member in members:
            cells = []
            for column in columns:
                others = [found[other, column][0] for other in members if other != member and (other, column) in found]
                own = found.get((member, column))
                beside = f" (others {mean(others):+.1f})" if others else ""
                cells.append("–" if own is None else f"{own[0]:+.1f} / {own[1]:+.1f}{beside}")
            lines.append(f"| {member}, {solver} | {' | '.join(cells)} |")
    return lines


def run(
    doc: str | None,
    name: str,
    members: Sequence[str],
    measure: Callable[[str, Maker], list[dict[str, Any]]],
    tables: Callable[[list[dict[str, Any]]], list[str]],
    **more: Any,
) -> None:
    """Measure the members that the command line names, keep each as soon as it is measured, and print what there is.

    Args:
        doc: of the script.
        name: of the script, and of the file of its figures.
        members: all that there are, in the order of the tables.
        measure: makes a member's rows.
        tables: makes Markdown of all rows.
        more: to be written beside them.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", choices=members, default=members)
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stem = name.replace("_", "-")
    path = common.RESULTS / f"{stem}.json"
    known = figures.read(path)["results"] if path.exists() else []
    maker = Maker(common.training_prompts(args.prompts))
    for member in args.members:
        known = [row for row in known if row["member"] != member] + measure(member, maker)
        known.sort(key=lambda row: members.index(row["member"]))
        common.save(stem, {"prompts": args.prompts, **more, "results": known}, f"python -m benchmarks.{name}")
    print("\n".join(tables(known)))


if __name__ == "__main__":
    run(__doc__, "first_steps", (*EULER, *DDIM), measure, table, steps=STEPS)
