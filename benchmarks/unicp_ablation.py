"""UniCP part by part, with reuse and with forecasts, at equal operations; beside fewer steps, PAB and TaylorSeer.

    python -m benchmarks.unicp_ablation [--model demo|MEMBER] [--pixels 320] [--prompts 16] [--only WORDS ...]

By operations and PSNR against the unaccelerated video of the same seed. With ``--time`` the rows are timed as well:
runs of one caption, each beside an unaccelerated one, and the median of the ratios. Every video's figures are
kept in ``benchmarks/results/unicp-MODEL.sqlite`` as soon as they are there, and a run that broke off goes on. Rows are
made caption by caption, the most important ones first. What is printed and written at the end are those that are there
for all captions, and beside them, if there are more, those that are there for the first four. "fixed windows" is what
PAB does, for all kinds of modules alike; "planned windows" are those of a target without a profile.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import unicp
import zoo
from benchmarks import common, figures
from unicp import BudgetConfig, Profile, UniCPConfig
from unicp.bench import peers
from unicp.offline import inspect
from unicp.policies import Config
from unicp.tensors import metrics

SHARES = {"60%": 1 / 0.6, "50%": 2.0, "33%": 3.0}
STEPS = 50
FEW = 4
"""Captions of the rows that explain what each part is worth; the others are of all captions."""
CLOCK = common.RESULTS / "unicp-clock.json"
"""What ``--time`` has measured, by model and row."""
Variant = Callable[[str], tuple[float, Any]]
"""Given a caption: the share of the denoiser's operations that ran, and the frames."""


class Bench:
    """One model, and its videos.

    Args:
        model: ``"demo"``, or a member of the proving ground.
        pixels: height and width of the videos, if not those it was trained for.
    """

    def __init__(self, model: str, pixels: int | None = None) -> None:
        self.name = model if pixels is None else f"{model}-{pixels}"
        if model == "demo":
            self.pipe, self.call = common.pipeline(), dict(common.CALL)
        else:
            self.pipe, self.call = zoo.load(model)
            self.pipe.set_progress_bar_config(disable=True)
        self.call["num_inference_steps"] = STEPS
        if pixels is not None:
            self.call |= {"height": pixels, "width": pixels}
        common.RESULTS.mkdir(exist_ok=True)
        self.profile_path = common.RESULTS / f"unicp-{self.name}.safetensors"
        self.timing = False  # count nothing
        self._whole: tuple[str, Any] = ("", None)
        self._operations = 0  # of an unaccelerated video

    @torch.inference_mode()
    def video(self, caption: str, **call: Any) -> Any:
        """Frames (F, H, W, 3) in [0, 1]; every caption has the same noise."""
        call = {**self.call, "output_type": "pt", "generator": torch.Generator().manual_seed(0), **call}
        return self.pipe(prompt=caption, **call).frames[0].permute(0, 2, 3, 1).float()

    def whole(self, caption: str) -> Any:
        """The unaccelerated video."""
        if self._whole[0] != caption:
            self._whole = (caption, self.video(caption))
        return self._whole[1]

    def profile(self) -> str:
        """The path of a profile, made on captions of the training side if it is not there."""
        if not self.profile_path.exists():
            made = unicp.calibrate(
                self.pipe,
                common.training_prompts(4),
                config=UniCPConfig(delta=0.15, delta_prune=0.1, pcas=True),
                checkpoint=self.profile_path.with_suffix(".part.safetensors"),
                progress=False,
                **self.call,
            )
            made.save(self.profile_path)
        return str(self.profile_path)

    def fixed(self, fill: str) -> Profile:
        """A profile by which nothing tells one step from another, so that windows are even."""
        known = Profile.load(self.profile())
        tensors = {
            name: torch.arange(1.0, tensor.shape[1] + 1).expand_as(tensor) * 0.01 if "/cache_" in name else tensor
            for name, tensor in known.tensors.items()
        }
        for name in [name for name in tensors if "/forecast_" in name]:
            tensors[name] = tensors[name.replace("/forecast_", "/cache_")]
        made = Profile(config=known.config, tensors=tensors, metadata=known.metadata)
        made.save(path := self.profile_path.with_name(f"unicp-{self.name}-fixed-{fill}.safetensors"))
        return Profile.load(path)

    # -- what is tried ---------------------------------------------------------------------------------------------

    def fewer(self, steps: int) -> Variant:
        return lambda caption: (steps / STEPS, self.video(caption, num_inference_steps=steps))

    def ours(self, make: Callable[[], Config]) -> Variant:
        def run(caption: str) -> tuple[float, Any]:
            with unicp.accelerate(self.pipe, make()) as session:
                frames = self.video(caption)
                return session.report().computed_fraction, frames

        return run

    def peer(self, name: str, label: str) -> Variant:
        """A cache of diffusers as it is; its share is that of the calls' operations, counted as they run."""

        def run(caption: str) -> tuple[float, Any]:
            applied, of = peers.known()[name](), peers.Run(self.pipe, {"prompt": caption, **self.call})
            if not self.timing:
                self._operations = self._operations or self._counted(lambda: self.video(caption))[0]
            applied.apply(of, label)
            try:
                if self.timing:
                    return 0.0, self.video(caption)
                ran, frames = self._counted(lambda: self.video(caption))
            finally:
                applied.remove(of)
            return ran / self._operations, frames

        return run

    def _counted(self, make: Callable[[], Any]) -> tuple[int, Any]:
        """Operations of the denoiser's calls, and what was made."""
        from unicp.tensors.flops import Counter

        total, denoiser = 0, self.pipe.transformer
        own = denoiser.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            with Counter() as counter:
                output = own(*args, **kwargs)
            total += counter.total
            return output

        denoiser.forward = forward
        try:
            made = make()
            return total, made
        finally:
            denoiser.forward = own

    def variants(self) -> dict[str, Variant]:
        """The rows of the table by name, the most important first."""
        found: dict[str, Variant] = {f"fewer steps ({steps})": self.fewer(steps) for steps in (30, 25, 17)}
        for share, speed in SHARES.items():
            budget = BudgetConfig(target_speedup=speed)
            found[f"the budget's default plan, {share}"] = self.ours(lambda budget=budget: budget)

        def add(name: str, shares: dict[str, float] = SHARES, **fields: Any) -> None:
            for share, speed in shares.items():
                profile = fields.get("profile")

                def make(speed: float = speed, profile: Any = profile) -> Config:
                    made = profile() if profile is not None else None
                    return UniCPConfig(**{**fields, "profile": made, "target_speedup": speed})

                found[f"{name}, {share}"] = self.ours(make)

        add("planned windows, forecast", {**SHARES, "39%": 1 / 0.39})  # what TaylorSeer leaves at an interval of 3
        add("planned windows, reuse", fill="reuse")
        add("planned windows, forecast, not made good", correct=False)
        add("planned windows, forecast, kept in eight bits", storage="int8")
        add("EDCW profiled, forecast", profile=self.profile)
        add("EDCW profiled, reuse", profile=self.profile, fill="reuse")
        add("fixed windows, forecast", profile=lambda: self.fixed("forecast"))
        add("fixed windows, reuse", profile=lambda: self.fixed("reuse"), fill="reuse")
        add("EDCW profiled, forecast, PCAS and DWS", profile=self.profile, pcas=True)
        add("EDCW profiled, reuse, PCAS and DWS", profile=self.profile, fill="reuse", pcas=True)
        add("EDCW profiled, reuse, PCAS, no DWS", profile=self.profile, fill="reuse", dws="off", pcas=True)
        for fill, deltas in (("forecast", (0.05, 0.1, 0.15, 0.2)), ("reuse", (0.1, 0.2))):
            for delta in deltas:
                online = UniCPConfig(delta=delta, fill=fill)
                found[f"EDCW online, {fill}, delta={delta:g}"] = self.ours(lambda online=online: online)
        for label in ("cache_interval=2", "cache_interval=3"):
            found[f"TaylorSeer of diffusers ({label})"] = self.peer("taylorseer", label)
        for label in ("range=2", "range=3"):
            found[f"PAB of diffusers ({label})"] = self.peer("pab", label)
        for fill in ("forecast", "reuse"):
            for delta in (0.1, 0.2):
                alone = UniCPConfig(delta=delta, delta_cross=0, delta_mlp=0, fill=fill)
                found[f"self-attention alone, {fill}, delta={delta:g}"] = self.ours(lambda alone=alone: alone)
        for name, fields in (
            ("self-attention alone", {}),
            ("self-attention alone, profiled", {"profile": self.profile}),
            ("self-attention alone, profiled, PCAS and DWS", {"profile": self.profile, "pcas": True}),
        ):
            for speed in (1.6, 1.8):
                add(name, {f"1/{speed:g} of the operations": speed}, delta_cross=0, delta_mlp=0, **fields)
        for windows in ("block", "unit"):
            for fill, deltas in (("forecast", (0.05, 0.1)), ("reuse", (0.1, 0.2))):
                for delta in deltas:
                    apart = UniCPConfig(delta=delta, fill=fill, windows=windows)
                    found[f"windows by {windows}, {fill}, delta={delta:g}"] = self.ours(lambda apart=apart: apart)
        for speed in (1.25, 1.5):
            inside = UniCPConfig(stack=BudgetConfig(target_speedup=speed))
            found[f"inside a budget of {speed:g}x"] = self.ours(lambda inside=inside: inside)
        return found


def speedups(bench: Bench, rows: dict[str, Variant], caption: str, repeats: int) -> dict[str, float]:
    """How many times faster than the unaccelerated pipeline each row makes a video; by the clock, one thread."""

    def seconds(make: Callable[[], Any]) -> float:
        began = time.perf_counter()
        make()
        return time.perf_counter() - began

    bench.timing = True
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, run in rows.items():
            whole = seconds(lambda: bench.video(caption))
            ratio = whole / seconds(lambda run=run: run(caption))
            if turn:  # the first turn warms up
                ratios[name].append(ratio)
    return {name: median(found) for name, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=("demo", *zoo.names()))
    parser.add_argument("--pixels", type=int, help="height and width; by default those that the model was trained for")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--draw", action="store_true", help="draw the profile's curves into docs/images and no more")
    parser.add_argument("--time", type=int, default=0, metavar="REPEATS", help="time the rows, so many runs of each")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names begin with one of these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", unicp.UnicpWarning)
    bench = Bench(args.model, args.pixels)
    if args.draw:
        for made in inspect.draw(Profile.load(bench.profile()), Path("docs/images"), "unicp"):
            print(f"written: {made}")
        return
    captions = unicp.demo.prompts(args.prompts)
    rows = bench.variants()
    chosen = [name for name in rows if not args.only or name.startswith(tuple(args.only))]
    clock = figures.read(CLOCK)["table"] if CLOCK.exists() else {}
    if args.time:
        found = speedups(bench, {name: rows[name] for name in chosen}, captions[0], args.time)
        clock[bench.name] = {**clock.get(bench.name, {}), **found}
        common.save("unicp-clock", {"steps": STEPS, "repeats": args.time, "table": clock})
        for name, ratio in found.items():
            print(f"{name:<50}{ratio:>7.2f}x")
        return
    failures: dict[str, str] = {}  # of caches that do not run on this model, in their own words
    with sqlite3.connect(common.RESULTS / f"unicp-{bench.name}.sqlite") as kept:
        kept.execute("create table if not exists made (row, caption, figures, primary key (row, caption))")
        for caption in captions:
            for name in chosen:
                if kept.execute("select 1 from made where row = ? and caption = ?", (name, caption)).fetchone():
                    continue
                if name in failures:
                    continue
                try:
                    share, frames = rows[name](caption)
                except Exception as error:
                    if "diffusers" not in name:
                        raise
                    failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                    print(f"{name}: {failures[name]}", flush=True)
                    continue
                measured = {"share": share, "psnr": min(metrics.psnr(frames, bench.whole(caption)), 120.0)}
                kept.execute("insert into made values (?, ?, ?)", (name, caption, json.dumps(measured)))
                kept.commit()
                print(f"{name}: {measured['share']:.3f} {measured['psnr']:.1f} dB  {caption}", flush=True)
        made = [(n, c, json.loads(f)) for n, c, f in kept.execute("select row, caption, figures from made")]
    table = tabled(made, list(rows), captions)
    parts = tabled(made, list(rows), captions[:FEW])
    if len(parts) == len(table):
        parts = []
    common.save(
        f"unicp-{bench.name}",
        {"prompts": captions, "steps": STEPS, "table": table, "few": FEW, "parts": parts, "failures": failures},
    )


def tabled(made: list[tuple[str, str, dict[str, float]]], rows: list[str], captions: list[str]) -> list[dict[str, Any]]:
    """The rows that are there for all of these captions."""
    table = []
    for name in rows:
        found = [one for row, caption, one in made if row == name and caption in captions]
        if len(found) < len(captions):
            continue
        psnr = [one["psnr"] for one in found]
        share = round(mean(one["share"] for one in found), 4)
        table.append(
            {"row": name, "computed_fraction": share, "psnr": round(mean(psnr), 2), "psnr_worst": round(min(psnr), 2)}
        )
        print(f"{name:<60}{share:>8.1%}{mean(psnr):>7.1f}{min(psnr):>7.1f}  of {len(captions)}")
    return table


if __name__ == "__main__":
    main()
