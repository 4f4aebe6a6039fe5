"""Videos of changing sizes, steps, configs and events in one process, each against a process that made no other.

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
EVENTS = (None, "prompt", "guidance", "weights", "interrupt", "exception", "training")
"""What happens in the middle of a video."""
EVERY = 25
"""How often memory is looked at."""


def request(number: int) -> tuple[str | None, str | None, dict[str, Any]]:
    """The config, event and call of a video. 8, 7, 5 and 3 have no common factor: the first 840 are all different."""
    call = {**SHAPES[number % len(SHAPES)], "steps": STEPS[number % len(STEPS)]}
    return NAMES[number % len(NAMES)], EVENTS[number % len(EVENTS)], call


def happening(pipe: Any, event: str | None) -> Any:
    """A callback by which it happens after the third step."""
    strength = []

    def callback(_: Any, i: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2 and event == "prompt":
            tensors["prompt_embeds"] = tensors["prompt_embeds"].flip(-1)
        elif i == 2 and event == "guidance":  # off for one step
            strength.append(pipe._guidance_scale)
            pipe._guidance_scale = 1.0
        elif i == 3 and strength:
            pipe._guidance_scale = strength.pop()
        elif i == 2 and event == "weights":
            scale(pipe, 0.5)
        elif i == 2 and event == "interrupt":
            pipe._interrupt = True
        elif i == 2 and event == "exception":
            raise InterruptedError
        elif i == 2 and event == "training":
            hidden, embeds = torch.ones(1, 4, 3, 4, 4), torch.ones(1, 8, 16)
            with torch.enable_grad():
                pipe.transformer(hidden_states=hidden, timestep=torch.tensor([500.0]), encoder_hidden_states=embeds)
        return tensors

    return callback


def scale(pipe: Any, factor: float) -> None:
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].weight.mul_(factor)


def video(pipe: Any, number: int) -> Any:
    name, event, call = request(number)
    if name is None:
        unicp.restore(pipe)
    else:
        session = unicp.accelerate(pipe, config_on("wan", name))
    names = ["latents", "prompt_embeds"]
    more = {"callback_on_step_end": happening(pipe, event), "callback_on_step_end_tensor_inputs": names}
    generator = torch.Generator().manual_seed(number)
    try:
        latents = quietly(lambda: WAN.run(pipe, lambda run, **k: run(**k).frames, generator=generator, **call, **more))
    except InterruptedError:
        latents = torch.zeros(1)
    finally:
        if event == "weights":
            scale(pipe, 2.0)
    assert name is None or event in ("interrupt", "exception") or not session.cached_tensors()
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
    different = len(NAMES) * len(EVENTS) * len(SHAPES) * len(STEPS)
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
