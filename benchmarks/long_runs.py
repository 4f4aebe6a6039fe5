"""The default plan of long runs under a multistep solver: its first steps, and its leaps, leaving one family out.

    python -m benchmarks.long_runs [--members ltx open-sora] [--prompts 8]

Under UniPC, at flow shifts of 1 to 8, as at shift 1 a run begins with long steps, and at shift 8 with short ones. What
the default plan has over one that begins with two short steps at any shift (``warmup_steps=2, cooldown_steps=1``), and
over the default without leaps (``leap=0``), which forecasts all skipped steps and has other first and last ones. All
compute equally many. Models that were trained by flow matching; captions of the training side, each against the
unaccelerated video.

A member that was measured before is kept; ``--members`` measures the named ones again.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

from benchmarks.first_steps import left_out, run
from benchmarks.promise import Maker, Situation, gain, psnrs
from unicp import BudgetConfig

MEMBERS = ("demo", "hunyuan", "ltx", "open-sora")
OURS, SHORT, NONE = "default", "two short steps first", "no leaps"
OTHERS: dict[str, dict[str, Any]] = {
    SHORT: {"warmup_steps": 2, "cooldown_steps": 1},
    NONE: {"leap": 0.0},
}
CELLS = (
    *((SHORT, 50, 3.0, shift) for shift in (1.0, 3.0, 5.0, 8.0)),
    *((SHORT, 30, 2.5, shift) for shift in (1.0, 5.0, 8.0)),  # at 3 it is that plan
    *((NONE, 50, speed, 3.0) for speed in (2.0, 2.5, 3.0)),
)
"""The other plan, the number of steps, the speed and the flow shift."""


class Shifted(Situation):
    """A member at another flow shift than its own."""

    def make(self, kinds: dict[str, Any]) -> Any:
        return Situation(self.scheduler, self.steps, shift=self.shift).make(kinds)


def measure(member: str, maker: Maker) -> list[dict[str, Any]]:
    """A row for each cell."""
    rows, known = [], {}
    for other, steps, speed, shift in sorted(CELLS, key=lambda cell: (cell[1], cell[3])):  # one whole run for each
        situation = Shifted("unipc", steps, shift=shift, member="" if member == "demo" else member)
        found, computed = {}, set()
        for name in (OURS, other):
            if (name, situation, speed) not in known:
                config = BudgetConfig(target_speedup=speed, **OTHERS.get(name, {}))
                frames, report = maker.videos(situation, steps, config)
                known[name, situation, speed] = psnrs(frames, maker.plain(situation, steps)), report.computed_steps
            found[name], number = known[name, situation, speed]
            computed.add(number)
        rows.append({"member": member, "steps": steps, "speed": speed, "shift": shift, "psnr": found})
        if len(computed) > 1:
            raise SystemExit(f"{member}, {head(rows[-1])}: {sorted(computed)} steps were computed")
        said = {name: f"{mean(values):.1f} / {min(values):.1f}" for name, values in found.items()}
        print(f"{member}, {head(rows[-1])}", said, flush=True)
    return rows


def head(row: dict[str, Any]) -> str:
    return f"{row['steps']} steps, {row['speed']:g}x, shift {row['shift']:g}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, a table each: what the default has over either other plan on each member, and over the others' mean."""
    lines = []
    for other in OTHERS:
        cells = sorted((row for row in rows if other in row["psnr"]), key=_place)
        found = {(row["member"], head(row)): gain(row["psnr"][other], row["psnr"][OURS]) for row in cells}
        lines += [*left_out({"UniPC": MEMBERS}, list(dict.fromkeys(map(head, cells))), found), ""]
    return lines[:-1]


def _place(row: dict[str, Any]) -> tuple[float, ...]:
    return -row["steps"], row["speed"], row["shift"]


if __name__ == "__main__":
    run(__doc__, "long_runs", MEMBERS, measure, tables)
