"""What each lever is worth on every member of the proving ground, and what tuning is worth beside plain plan shapes.

    python -m benchmarks.levers [--members latte ltx] [--prompts 4]

At twice and three times the speed by steps, 50 steps, held-out captions, each against the unaccelerated video of the
same seed: the default budget; the same with one lever off or on; a dozen plain shapes of plans, by how many first and
last steps are computed, with leaps and without; a profile of ``unicp.tune`` at low effort, from four captions of the
training side (and from one picture, for image to video); fewer steps.

Resumable: every video's figures, and what was tuned, are kept in ``benchmarks/results`` (not committed), under a name
that changes with the code that makes plans.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import unicp
from benchmarks import common
from benchmarks.zoo import Situation, members
from unicp import BudgetConfig, ScheduleConfig, UniCPConfig
from unicp.demo import scenes
from unicp.policies import Config
from unicp.tensors import metrics

MEMBERS = members()
STEPS = 50
SPEEDS = (2.0, 3.0)
TUNED_ON = 4
DEFAULT, TUNED, FEWER = "default", "tuned on 4 captions", "fewer steps"
SHAPES = tuple(itertools.product((2, 5, 9), (1, 3), (BudgetConfig.leap, 0.0)))
"""First and last steps that are computed, and the share of the run in which leaps are allowed."""
LEVERS: dict[str, Callable[[float], Config]] = {
    "no correction": lambda speed: BudgetConfig(target_speedup=speed, correct=False),
    "no leaps": lambda speed: BudgetConfig(target_speedup=speed, leap=0.0),
    "no first steps beyond two": lambda speed: BudgetConfig(target_speedup=speed, warmup_steps=2),
    "even steps, forecast linearly": lambda speed: ScheduleConfig(interval=round(speed), fill="linear"),
    "even steps, repeated": lambda speed: ScheduleConfig(interval=round(speed)),
    "UniCP inside, for half of what is saved": lambda speed: UniCPConfig(
        target_speedup=None, stack=BudgetConfig(target_speedup=speed / 1.25), delta=0.05
    ),
}


def code() -> str:
    """Eight characters for the code that makes and plays plans: what was measured with another one is another thing."""
    made = hashlib.sha256()
    for floor in ("policies", "engine", "tensors", "offline"):
        for path in sorted((Path(unicp.__file__).parent / floor).rglob("*.py")):
            made.update(path.read_bytes())
    return made.hexdigest()[:8]


def shape_name(first: int, last: int, leap: float) -> str:
    return f"first {first}, last {last}" + (", no leaps" if leap == 0 else "")


class Bench:
    """One member, and its videos."""

    def __init__(self, member: str) -> None:
        self.member = member
        situation = Situation(member, STEPS)
        self.pipe, self.call = situation.load()
        self.given = situation.given
        self._whole: tuple[str, Any] = ("", None)

    @torch.inference_mode()
    def video(self, scene: scenes.Scene, **call: Any) -> Any:
        """Frames (F, C, H, W) in [0, 1]; every caption has the same noise."""
        call = {**self.call, **self.given(scene), "generator": torch.Generator().manual_seed(0), **call}
        return self.pipe(prompt=scene.caption(), output_type="pt", **call).frames[0].float()

    def whole(self, scene: scenes.Scene) -> Any:
        """The unaccelerated video."""
        if self._whole[0] != scene.caption():
            self._whole = (scene.caption(), self.video(scene))
        return self._whole[1]

    def profile(self) -> Any:
        """A profile, tuned if it is not there."""
        path = common.RESULTS / f"levers-{self.member}-{code()}.safetensors"
        if not path.exists():
            made = unicp.tune(
                self.pipe,
                common.training_prompts(TUNED_ON),
                effort="low",
                progress=False,
                checkpoint=path.with_suffix(".part.json"),
                **self.call,
                **self.given(common.training_scenes(1)[0]),
            )
            made.save(path)
        return unicp.Profile.load(path)

    def configs(self, speed: float) -> dict[str, Config]:
        """What is tried, but for fewer steps."""
        found: dict[str, Config] = {DEFAULT: BudgetConfig(target_speedup=speed)}
        found |= {name: make(speed) for name, make in LEVERS.items()}
        for first, last, leap in SHAPES:
            found[shape_name(first, last, leap)] = BudgetConfig(
                target_speedup=speed, warmup_steps=first, cooldown_steps=last, leap=leap
            )
        try:
            found[TUNED] = BudgetConfig(profile=self.profile(), target_speedup=speed)
        except unicp.UnicpError as error:
            print(f"{self.member}: {error}")
        return found

    def row(self, speed: float, config: Config | None, scene: scenes.Scene) -> dict[str, float]:
        """Share of the operations, and PSNR."""
        if config is None:
            steps = round(STEPS / speed)
            return {"share": steps / STEPS, "psnr": self._psnr(self.video(scene, num_inference_steps=steps), scene)}
        with unicp.accelerate(self.pipe, config) as session:
            frames = self.video(scene)
            share = session.report().computed_fraction
        return {"share": share, "psnr": self._psnr(frames, scene)}

    def _psnr(self, frames: Any, scene: scenes.Scene) -> float:
        return min(float(metrics.psnr(frames, self.whole(scene))), 120.0)


def measure(member: str, held_out: list[scenes.Scene], kept: sqlite3.Connection) -> None:
    bench = Bench(member)
    tried = {speed: {**bench.configs(speed), FEWER: None} for speed in SPEEDS}
    for scene in held_out:
        for speed, rows in tried.items():
            for name, config in rows.items():
                key = (member, speed, name, scene.caption())
                if kept.execute(
                    "select 1 from made where (member, speed, row, caption) = (?, ?, ?, ?)", key
                ).fetchone():
                    continue
                found = bench.row(speed, config, scene)
                kept.execute("insert into made values (?, ?, ?, ?, ?)", (*key, json.dumps(found)))
                kept.commit()
                print(f"{member} {speed:g}x {name}: {found['share']:.3f} {found['psnr']:.1f} dB", flush=True)


def tabled(kept: sqlite3.Connection, captions: list[str]) -> list[dict[str, Any]]:
    """A line for each member, speed and row that is there for all captions."""
    found: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    kept_rows = sorted(kept.execute("select * from made order by rowid"), key=lambda row: MEMBERS.index(row[0]))
    for member, speed, row, caption, made in kept_rows:
        if caption in captions:
            found.setdefault((member, speed, row), []).append(json.loads(made))
    return [
        {
            "member": member,
            "speed": speed,
            "row": row,
            "share": round(mean(one["share"] for one in made), 3),
            "psnr": round(mean(one["psnr"] for one in made), 1),
            "worst": round(min(one["psnr"] for one in made), 1),
        }
        for (member, speed, row), made in found.items()
        if len(made) == len(captions)
    ]


def at(table: list[dict[str, Any]], member: str, speed: float, row: str, which: str = "psnr") -> float | None:
    return next((r[which] for r in table if (r["member"], r["speed"], r["row"]) == (member, speed, row)), None)


def lever_table(table: list[dict[str, Any]]) -> list[str]:
    """Markdown: what each lever, off or on, has over the default plan, in dB, by member."""
    names = list(dict.fromkeys(row["member"] for row in table))
    rows = [*LEVERS, FEWER]
    lines = [f"| at {' / '.join(f'{s:g}x' for s in SPEEDS)} | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row in rows:
        cells = [" / ".join(_over_default(table, name, speed, row) for speed in SPEEDS) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def _over_default(table: list[dict[str, Any]], member: str, speed: float, row: str) -> str:
    """In dB; with the share of the operations where it is another."""
    psnr, usual = at(table, member, speed, row), at(table, member, speed, DEFAULT)
    if psnr is None or usual is None:
        return "–"
    share, whole = at(table, member, speed, row, "share"), at(table, member, speed, DEFAULT, "share")
    assert share is not None and whole is not None
    return f"{psnr - usual:+.1f}" + (f" ({share:.0%})" if abs(share - whole) > 0.025 else "")


def tuning_table(table: list[dict[str, Any]]) -> list[str]:
    """Markdown: the default plan, a tuned one, and plain shapes: the best one of the other members, and of this one."""
    lines = [
        "| | default plan | tuned | the others' best shape | best shape of a dozen |",
        "|---|---:|---:|---|---|",
    ]
    names = tuple(dict.fromkeys(row["member"] for row in table))
    for name in names:
        for speed in SPEEDS:
            cells = [_said(table, name, speed, row) for row in (DEFAULT, TUNED)]
            for chosen in (tuple(other for other in names if other != name), (name,)):
                best = best_shape(table, chosen, speed)
                cells.append(f"{_said(table, name, speed, best)} ({best})" if best else "–")
            lines.append(f"| {name}, {speed:g}x | {' | '.join(cells)} |")
    return lines


def best_shape(table: list[dict[str, Any]], members: tuple[str, ...], speed: float) -> str:
    """The plain shape that is furthest above the default plan in the mean over these members; empty without any."""
    scores: dict[str, float] = {}
    for shape in SHAPES:
        name = shape_name(*shape)
        pairs = [(at(table, member, speed, name), at(table, member, speed, DEFAULT)) for member in members]
        gains = [psnr - usual for psnr, usual in pairs if psnr is not None and usual is not None]
        if gains and len(gains) == len(members):
            scores[name] = mean(gains)
    return max(scores, key=lambda name: scores[name], default="")


def _said(table: list[dict[str, Any]], member: str, speed: float, row: str) -> str:
    psnr, worst = at(table, member, speed, row), at(table, member, speed, row, "worst")
    return "–" if psnr is None or worst is None else f"{psnr:.1f} / {worst:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", choices=MEMBERS, default=MEMBERS)
    parser.add_argument("--prompts", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", unicp.UnicpWarning)
    common.RESULTS.mkdir(exist_ok=True)
    held_out = scenes.held_out_scenes(args.prompts)
    path: Path = common.RESULTS / f"levers-{code()}.sqlite"
    with sqlite3.connect(path) as kept:
        key = "primary key (member, speed, row, caption)"
        kept.execute(f"create table if not exists made (member, speed, row, caption, figures, {key})")
        for member in args.members:
            measure(member, held_out, kept)
        table = tabled(kept, [scene.caption() for scene in held_out])
    there = tuple(dict.fromkeys(row["member"] for row in table))  # by several commands, perhaps
    made_by = "python -m benchmarks.levers" + (f" --members {' '.join(there)}" if there != MEMBERS else "")
    made_by += f" --prompts {args.prompts}" if args.prompts != 4 else ""
    common.save("levers", {"prompts": args.prompts, "steps": STEPS, "table": table}, made_by)
    print("\n".join([*lever_table(table), "", *tuning_table(table)]))


if __name__ == "__main__":
    main()
