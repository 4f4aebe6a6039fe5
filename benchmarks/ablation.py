"""UniCP on the demo model: the U shape, and what each part of the method is worth.

    python -m benchmarks.ablation [--prompts 16]

First calibrates on captions of the training side (a profile in benchmarks/results/, kept and used again; the figure of
its error curves goes to docs/images/). Then every variant makes every held-out prompt, in turn, against the
unaccelerated video of the same seed. "fixed window" is what PAB does: the same interval at every step, one for each
kind of module; here it is a profile that says "no error" up to the interval. "shared": one window for all modules.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import unicp
from benchmarks import common
from unicp import AdaCacheConfig, Profile, UniCPConfig
from unicp.offline import inspect
from unicp.policies import Config

PROFILE = common.RESULTS / "demo-50.safetensors"
IMAGES = Path("docs/images")


def calibrated(pipe: Any) -> Profile:
    if not PROFILE.exists():
        common.RESULTS.mkdir(exist_ok=True)
        profile = unicp.calibrate(
            pipe,
            common.training_prompts(4),
            config=UniCPConfig(),
            checkpoint=PROFILE.with_suffix(".part.safetensors"),
            **common.CALL,
        )
        profile.save(PROFILE)
    return Profile.load(PROFILE)


def fixed(profile: Profile, **windows: int) -> str:
    """A profile of windows that are the same at every step: how many steps each kind of module is kept."""
    tensors = dict(profile.tensors)
    for unit, kind in profile.of("transformer").units.items():
        for statistic in ("mean", "max"):
            name = f"transformer/{unit}/cache_{statistic}"
            table = torch.full_like(tensors[name], 9.0)
            table[:, : windows.get(kind, 0)] = 0.0
            tensors[name] = table
    path = common.RESULTS / f"fixed-{'-'.join(map(str, windows.values()))}.safetensors"
    Profile(config=profile.config, tensors=tensors, metadata=profile.metadata).save(path)
    return str(path)


def variants(profile: Profile) -> dict[str, Config]:
    """The rows of the table. MLPs take the self-attention's threshold: their curves are alike."""
    path = str(PROFILE)

    def edcw(delta: float, **more: Any) -> UniCPConfig:
        more = {"pcas": False, "profile": path, **more}
        return UniCPConfig(delta=delta, delta_cross=delta, delta_mlp=delta, **more)

    def fixed_window(**windows: int) -> UniCPConfig:
        return edcw(0.5, profile=fixed(profile, **windows))

    middle = {"pcas": True, "delta_prune": 0.15}
    shared: dict[str, Any] = {"shared_windows": True}
    online: dict[str, Any] = {"edcw": "online", "profile": None}
    return {
        "fixed window (attention 1, cross 3, MLP 1)": fixed_window(self_attention=1, cross_attention=3, mlp=1),
        "fixed window (attention 2, cross 5, MLP 2)": fixed_window(self_attention=2, cross_attention=5, mlp=2),
        "fixed window (1 for all)": fixed_window(self_attention=1, cross_attention=1, mlp=1),
        "fixed window (2 for all)": fixed_window(self_attention=2, cross_attention=2, mlp=2),
        "EDCW online, 0.10": edcw(0.10, **online),
        "EDCW profiled, 0.08": edcw(0.08),
        "EDCW profiled, 0.12": edcw(0.12),
        "EDCW online, shared, 0.10": edcw(0.10, **online, **shared),
        "EDCW online, shared, 0.15": edcw(0.15, **online, **shared),
        "EDCW profiled, shared, 0.065": edcw(0.065, **shared),
        "EDCW profiled, shared, 0.08": edcw(0.08, **shared),
        "EDCW profiled, shared, 0.11": edcw(0.11, **shared),
        "EDCW profiled, shared, 0.08, PCAS, DWS switch": edcw(0.08, **middle, **shared),
        "EDCW profiled, 0.12, PCAS": edcw(0.12, dws="off", **middle),
        "EDCW profiled, 0.12, PCAS, DWS switch": edcw(0.12, **middle),
        "EDCW profiled, 0.12, PCAS, DWS blend": edcw(0.12, dws="blend", **middle),
        "EDCW profiled, 0.12, PCAS, DWS delta": edcw(0.12, dws="delta", **middle),
        "AdaCache, EDCW 0.08 inside": edcw(0.08, stack=AdaCacheConfig()),
        "AdaCache, EDCW shared, 0.08 inside": edcw(0.08, stack=AdaCacheConfig(), **shared),
        "AdaCache": AdaCacheConfig(),
    }


def draw(profile: Profile) -> None:
    """The U shape, with the plan of the table's middle row under it."""
    config = variants(profile)["EDCW profiled, 0.12, PCAS, DWS switch"].replace(profile=None)
    assert isinstance(config, UniCPConfig)
    shown = Profile(config=config, tensors=profile.tensors, metadata=profile.metadata)
    for made in inspect.draw(shown, IMAGES, "unicp"):
        print(f"written: {made}")
    print(inspect.text(shown).split("\nplan at")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--fresh", action="store_true", help="calibrate again")
    args = parser.parse_args()
    if args.fresh:
        PROFILE.unlink(missing_ok=True)
    pipe = common.pipeline()
    profile = calibrated(pipe)
    draw(profile)
    configs = variants(profile)
    prompts = unicp.demo.prompts(args.prompts)
    rows = common.measured(pipe, prompts, configs, fewer=(33, 25))
    table = common.table("variant", rows)
    common.save("ablation", {"prompts": prompts, "steps": unicp.demo.STEPS, "table": table, "per_prompt": rows})
    for leftover in common.RESULTS.glob("fixed-*.safetensors"):
        leftover.unlink()


if __name__ == "__main__":
    main()
