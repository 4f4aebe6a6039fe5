"""What every method decides and makes, in hashes: the same before and after a change that is to change nothing.

    python -m tests.recorded before.json
    python -m tests.recorded after.json --against before.json

Latents and actions of every case of the contract on every tiny family, and of the methods on the demo model under
several schedulers. Hashes of latents hold on one machine and one version of torch only, so none are committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

import unicp
from benchmarks import common
from tests import contract
from tests.tiny import FAMILIES

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, Any] = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(solver_order=2, **FLOW),
    "deis": lambda: diffusers.DEISMultistepScheduler(**FLOW),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
}
UNITS = unicp.UniCPConfig(delta=0.2, delta_mlp=0, fill="reuse", windows="unit", max_window=5)
METHODS: dict[str, Any] = {
    **{f"budget-{speed}": unicp.BudgetConfig(target_speedup=speed) for speed in (1.5, 2.0, 3.0)},
    "budget-override": unicp.BudgetConfig(target_speedup=2.0, override_reserve=0.3, override_zscore=0.01),
    "budget-forecasts": unicp.BudgetConfig(target_speedup=2.0, leap=0.0),
    "adacache": unicp.AdaCacheConfig(),
    "adacache-forecast": unicp.AdaCacheConfig(fill="forecast", moreg=True),
    "schedule": unicp.ScheduleConfig(interval=2, fill="linear"),
    "unicp": UNITS.replace(delta_mlp=0.2),
    "unicp-in-budget": UNITS.replace(stack=unicp.BudgetConfig(target_speedup=1.5)),
    "unicp-forecast": unicp.UniCPConfig(target_speedup=1.5),
    "unicp-forecast-in-budget": unicp.UniCPConfig(stack=unicp.BudgetConfig(target_speedup=1.5)),
}


def hashed(value: Any) -> str:
    """Of a tensor by its bytes, of anything else by how it is written."""
    data = value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def recorded() -> Iterator[tuple[str, tuple[str, str, str]]]:
    """By name: the hash of the latents, that of the actions with all that was measured, and the bare actions."""
    for family in FAMILIES:
        names = contract.all_cases_of(family) if FAMILIES[family].primary else contract.cases_of(family)
        for name in names:
            latents, actions = contract.fresh(family, name)
            yield f"{family} {name}", (hashed(latents), hashed(actions), " ".join(a[3] for a in actions))
    pipe = common.pipeline()
    for scheduler, make in SCHEDULERS.items():
        for steps in (8, 14, 30) if scheduler == "unipc" else (14,):
            for name, config in METHODS.items():
                pipe.scheduler = make()
                call = {**common.CALL, "num_inference_steps": steps, "output_type": "latent"}
                with unicp.accelerate(pipe, config) as session:
                    made = pipe("a red square moves right", generator=torch.Generator().manual_seed(0), **call).frames
                    actions = contract.actions(session.report())
                yield (
                    f"demo {scheduler} {steps} {name}",
                    (
                        hashed(made),
                        hashed(actions),
                        " ".join(str(action[3]) for action in actions),
                    ),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier recording; what differs is printed")
    parser.add_argument("--only", default="", help="names that begin so")
    args = parser.parse_args()
    before = json.loads(args.against.read_text()) if args.against else {}
    found: dict[str, tuple[str, str, str]] = {}
    changed = 0
    for name, hashes in contract.quietly(lambda: recorded()):
        if not name.startswith(args.only):
            continue
        found[name] = hashes
        if before and before.get(name) != list(hashes):
            changed += 1
            old = before.get(name, ["", "", "not there"])
            what = [kind for kind, a, b in zip(("latents", "measured", "actions"), old, hashes, strict=True) if a != b]
            print(f"{name}: {', '.join(what)} differ" + (f"\n  {old[2]}\n  {hashes[2]}" if "actions" in what else ""))
    args.out.write_text(json.dumps(found, indent=0))
    gone = sorted(name for name in set(before) - set(found) if name.startswith(args.only))
    print(f"{len(found)} recorded, {changed} changed, gone: {gone or 'none'}")
    sys.exit(bool(changed or gone))


if __name__ == "__main__":
    main()
