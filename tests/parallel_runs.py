"""The four processes of ``test_parallel.py``: two replicas of a tiny Wan, each on two processes with gloo.

A replica has its tokens spread over its processes (Ulysses or ring), or a branch of guidance on each.

    python -m tests.parallel_runs SCENARIO FOLDER

imports torch and diffusers once, forks into the four, and ends as the first of them that failed. Each writes what came
out to FOLDER/RANK.pt, and what it says to FOLDER/RANK.log.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import unicp
from tests.contract import actions, case, quietly
from tests.tiny import FAMILIES
from unicp.errors import UnicpError

WAN = FAMILIES["wan"]
REPLICAS = ({"steps": 10, "seed": 0}, {"steps": 6, "seed": 1})
"""What each replica generates: they do not have the same number of steps."""


def spread(pipe: Any, mesh: Any, ring: bool = False, **fields: Any) -> None:
    """What ``enable_parallelism`` does. It wants an accelerator itself, but the hooks that it sets do not."""
    degrees = {"ring_degree": 2} if ring else {"ulysses_degree": 2}
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(**degrees, **fields))
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    for module in pipe.transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(pipe.transformer, config.context_parallel_config, pipe.transformer._cp_plan)
    pipe.transformer._parallel_config = config


def run(name: str, replica: int, mesh: Any, order: str = "before", ring: bool = False) -> dict[str, Any]:
    pipe = WAN.build()
    if order == "before":
        spread(pipe, mesh, ring)
    session = unicp.accelerate(pipe, case(name).config)
    if order == "after":
        spread(pipe, mesh, ring)
    latents = quietly(lambda: WAN.generate(pipe, **REPLICAS[replica]))
    return {"latents": latents, "actions": actions(session.report()), "kept": len(session.cached_tensors())}


def together(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """Every method, at different numbers of steps; the second replica is late, and the first does not wait for it."""
    ready = folder / "the first replica is done"
    if replica == 1:
        while not ready.exists():
            time.sleep(0.05)
    names = ("adacache-residual", "adacache-forecast", "schedule-stack", "unicp-online")
    found: dict[str, Any] = {name: run(name, replica, mesh) for name in names}
    found["after"] = run("adacache-residual", replica, mesh, "after")
    if rank == 0:
        ready.touch()
    return found


def with_sums(
    _: Any, query: Any, key: Any, value: Any, *settings: Any, _save_ctx: bool = True, _parallel_config: Any = None
) -> Any:
    """Attention (B, T, H, d) with the logarithms (B, T, H) of its softmax's sums, by which ring attention puts the
    parts of a sequence together. diffusers' own attention for CPUs does not tell them."""
    scale = settings[3]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def ring(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """diffusers' ring attention around attention that is good for it."""
    attention_dispatch._native_attention_forward_op = with_sums
    names = ("adacache-residual", "schedule-stack", "unicp-online")
    found: dict[str, Any] = {name: run(name, replica, mesh, ring=True) for name in names}
    found["after"] = run("adacache-residual", replica, mesh, "after", ring=True)
    return found


def ring_as_it_is(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """The same with nothing exchanged, unaccelerated and accelerated: what is said, and that the model is usable."""
    said: dict[str, Any] = {}
    for name in (None, "adacache-residual"):
        pipe = WAN.build()
        spread(pipe, mesh, ring=True)
        session = None if name is None else unicp.accelerate(pipe, case(name).config)
        for again in (1, 2):
            try:
                quietly(lambda pipe=pipe: WAN.generate(pipe, **REPLICAS[replica]))
            except ValueError as error:
                said[f"{name} {again}"] = f"{type(error).__name__}: {error}"
        said[f"{name} kept"] = 0 if session is None else len(session.cached_tensors())
    return said


def guidance(
    rank: int, replica: int, mesh: Any, folder: Path, names: tuple[str, ...] = ("adacache-residual", "unicp-online")
) -> dict[str, Any]:
    """Even processes run the branch of the prompt, odd ones that of the negative prompt."""
    group = mesh._flatten().get_group()
    negative = rank % 2
    request = {**REPLICAS[replica], "prompts": (101 if negative else 1,), "guidance": False}

    def both(_: Any, __: Any, output: Any) -> Any:
        parts = [torch.empty_like(output[0]) for _ in range(2)]
        dist.all_gather(parts, output[0].contiguous(), group=group)
        return (parts[1] + 4.0 * (parts[0] - parts[1]),)

    def made(config: Any, among: Any) -> dict[str, Any]:
        pipe = WAN.build()
        session = unicp.accelerate(pipe, config, group=among)
        pipe.transformer.register_forward_hook(both)  # runs after ours, at skipped steps too
        latents = quietly(lambda: WAN.generate(pipe, **request))
        kept = len(session.cached_tensors())
        return {"latents": latents, "actions": actions(session.report()), "kept": kept}

    found: dict[str, Any] = {name: made(case(name).config, group) for name in names}
    everything = case("adacache-residual").always_compute
    found["computed"], found["computed alone"] = made(everything, group), made(everything, None)
    # A threshold between what the two measure at the first comparison: alone, they decide differently.
    own = torch.tensor([a[5] for a in found["computed alone"]["actions"] if a[5] is not None][:1])
    each = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(each, own, group=group)
    torn = unicp.AdaCacheConfig(codebook=((float(sum(each)) / 2, 4), (1e6, 1)))
    found["torn"], found["torn alone"] = made(torn, group), made(torn, None)
    return found


def guidance_further(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """The same with the other kinds of filling."""
    return guidance(rank, replica, mesh, folder, ("adacache-forecast", "schedule-stack"))


SHARDED = ("schedule-linear", "budget-default", "budget-override")
"""What needs no group: all processes have one plan, or share what they measure."""


def sharded(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """Weights sharded over the two processes of a replica (FSDP), each of which makes a video of its own."""
    found: dict[str, Any] = {}
    for name in (*SHARDED, "adacache-residual"):
        pipe = WAN.build()
        for module in (*pipe.transformer.blocks, pipe.transformer):
            fully_shard(module, mesh=mesh["ulysses"])
        session = unicp.accelerate(
            pipe, case(name).config, group=None if name in SHARDED else mesh.get_group("ulysses")
        )
        request = {**REPLICAS[replica], "seed": rank}
        latents = quietly(lambda pipe=pipe, request=request: WAN.generate(pipe, **request))
        found[name] = {"latents": latents, "actions": actions(session.report()), "kept": len(session.cached_tensors())}
    return found


def failing(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    """One process of each replica fails in the middle of a run, and ends."""
    pipe = WAN.build()
    spread(pipe, mesh)
    unicp.accelerate(pipe, case("adacache-residual").config)

    def fail(pipe: Any, index: int, *_: Any) -> dict[str, Any]:
        if index == 3 and rank % 2 == 1:
            raise RuntimeError("this one fails")
        return {}

    began = time.monotonic()
    try:
        quietly(lambda: WAN.generate(pipe, callback=fail, **REPLICAS[replica]))
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - began}
    return {}


def refused(rank: int, replica: int, mesh: Any, folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for what, name in (("maps", "unicp-maps"), ("uneven", "adacache-residual"), ("compiled", "adacache-residual")):
        pipe = WAN.build()
        spread(pipe, mesh, **({"ulysses_anything": True} if what == "uneven" else {}))
        if what == "compiled":
            pipe.transformer.compile_repeated_blocks(backend="eager")
        try:
            unicp.accelerate(pipe, case(name).config)
        except UnicpError as error:
            said[what] = str(error)
    try:
        unicp.calibrate(pipe, ["a"])
    except UnicpError as error:
        said["calibrate"] = str(error)
    return said


SCENARIOS = {
    "together": together,
    "ring": ring,
    "ring_as_it_is": ring_as_it_is,
    "guidance": guidance,
    "guidance_further": guidance_further,
    "sharded": sharded,
    "failing": failing,
    "refused": refused,
}


def main(scenario: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    whole = init_device_mesh("cpu", (2, 2, 1) if scenario.startswith("ring") else (2, 1, 2), mesh_dim_names=NAMES)
    found = SCENARIOS[scenario](rank, rank // 2, whole["ring", "ulysses"], folder)
    torch.save(found, folder / f"{rank}.pt")
    if scenario != "failing":
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a process that has failed


NAMES = ("replica", "ring", "ulysses")


def forked(scenario: str, rank: int, folder: Path) -> int:
    """A process of its own for one rank: its id."""
    child = os.fork()
    if child:
        return child
    with open(folder / f"{rank}.log", "wb") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        main(scenario, rank, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)  # not reached where all went well


if __name__ == "__main__":
    ranks = [forked(sys.argv[1], rank, Path(sys.argv[2])) for rank in range(4)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0 for rank in ranks))
