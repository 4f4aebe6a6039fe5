"""Two hundred videos of changing sizes, steps and configs in one process, each against a process that made no other.

    python -m tests.soak RUNS

Prints what was found as JSON. One thread, so that all processes add up in the same order.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import unicp
from tests.contract import config_on, quietly
from tests.tiny import FAMILIES

WAN = FAMILIES["wan"]
NAMES = (
    None,
    "adacache-residual",
    "adacache-forecast",
    "schedule-linear",
    "schedule-stack",
    "unicp-online",
    "unicp-switch",
    "unicp-in-adacache",
)
SHAPES: tuple[dict[str, Any], ...] = (
    {"size": 32},
    {"size": 48},
    {"size": 32, "frames": 9},
    {"size": 32, "prompts": (1, 2)},
    {"size": 48, "guidance": False},
)
STEPS = (4, 7, 10)
EVERY = 25
"""How often memory is looked at."""


def request(number: int) -> tuple[str | None, dict[str, Any]]:
    """The config and the call of a video. 8, 5 and 3 have no common factor: the first 120 are all different."""
    return NAMES[number % len(NAMES)], {**SHAPES[number % len(SHAPES)], "steps": STEPS[number % len(STEPS)]}


def video(pipe: Any, number: int) -> Any:
    name, call = request(number)
    if name is None:
        unicp.restore(pipe)
    else:
        session = unicp.accelerate(pipe, config_on("wan", name))
    latents = quietly(lambda: WAN.generate(pipe, **call))
    assert name is None or not session.cached_tensors()
    return latents


def in_a_process_of_its_own(number: int, folder: Path) -> Any:
    """The same video, made by a child that made none before."""
    path = folder / f"{number}.pt"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.save(video(WAN.build(), number), path)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0, number
    return torch.load(path, weights_only=True)


def resident() -> int:
    """Bytes of memory that the process has at this moment (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if isinstance(o, torch.Tensor)]
    return {
        "resident": resident(),
        "objects": len(objects),
        "tensors": len(tensors),
        "bytes": sum(t.untyped_storage().nbytes() for t in tensors),
        "ours": sum(str(type(o).__module__).startswith(("unicp.engine", "unicp.hosts")) for o in objects),
    }


def main(runs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    config_on("wan", "unicp-switch")  # makes the profile, which the children find
    different = len(NAMES) * len(SHAPES) * len(STEPS)
    with tempfile.TemporaryDirectory() as folder:
        # Before the long-lived process makes any itself: a child begins with what its parent has.
        expected = {n: in_a_process_of_its_own(n, Path(folder)) for n in range(min(runs, different))}
    pipe, other, seen = WAN.build(), [], []
    for number in range(runs):
        if not torch.equal(video(pipe, number), expected[number % different]):
            other.append(number)
        if number % EVERY == EVERY - 1:
            unicp.restore(pipe)
            seen.append(held())
    return {"other": other, "held": seen, "different": len({repr(request(n)) for n in range(different)})}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
