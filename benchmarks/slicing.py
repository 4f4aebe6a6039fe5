"""Sliced against full attention of one module (PCAS), by sequence length: time, operations, error.

    python -m benchmarks.slicing [--tokens 1024 4096 16384] [--heads 4] [--ranks 32 64 96]
    python -m benchmarks.slicing --member wan-large-frame [--pixels 400]

A self-attention module of the Wan architecture with head size 128 and random weights, with rotary embedding, on random
hidden states: the whole module is timed, projections included. Speed does not depend on what the weights are. The error
does: random weights have no preferred directions, so the one here is the worst there is.

``--member`` takes the self-attention modules of a trained model of the proving ground instead, in a run of it at so
many pixels that the sequence is long: bases from one caption, errors on another that the model never saw. Then videos
at the member's own size in which every self-attention module is sliced at every step, beside fewer steps.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import mean, median
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

import zoo
from benchmarks import common
from unicp.bench import harness
from unicp.demo import scenes
from unicp.engine.fills.units import output_change, worst
from unicp.engine.slicing.attention import SlicedAttention, basis, instrumented, second_moments
from unicp.tensors.flops import Counter
from unicp.tensors.metrics import psnr

SIZE = 128


def rotary(tokens: int, device: Any) -> tuple[Any, Any]:
    angle = torch.rand(1, tokens, 1, SIZE // 2, device=device) * 6
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


def moments(module: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    found: list[Any] = []

    def attend(call: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(second_moments(query, heads_first) + second_moments(key, heads_first))
        found.append(second_moments(value, heads_first))
        return call(query, key, value, *args, **kwargs)

    own = module.processor
    module.processor = instrumented(own, attend)
    run()
    module.processor = own
    return found[0], found[1]


def timed(run: Callable[[], Any], device: Any = None) -> Callable[[], float]:
    def once() -> float:
        began = time.perf_counter()
        run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return once


def error(output: Any, reference: Any) -> float:
    """Relative change of a module's output."""
    return float(worst(output_change(output, reference, 1)))


def flops(run: Callable[[], Any]) -> int:
    with Counter() as counter:
        run()
    return counter.total


@torch.inference_mode(False)
@torch.no_grad()
def measure(
    tokens: int, heads: int, ranks: list[int], repeats: int, device: Any, dtype: Any = torch.float32
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    module = WanAttention(dim=heads * SIZE, heads=heads, dim_head=SIZE, processor=WanAttnProcessor())
    module = module.to(device, dtype)
    hidden = torch.randn(1, tokens, heads * SIZE, device=device, dtype=dtype)
    rope = rotary(tokens, device)
    call: tuple[Any, ...] = (hidden, None, None, rope)

    def full() -> Any:
        return module(*call)

    p_qk, p_v = (basis(moment, SIZE) for moment in moments(module, full))
    variants: dict[str, Callable[[], Any]] = {"full": full}
    for rank in ranks:
        twin = SlicedAttention(module, p_qk[..., :rank], p_v[..., :rank], fold=True)
        variants[str(rank)] = lambda twin=twin: twin(module.forward, call, {})  # type: ignore[misc]

    seconds = common.interleaved({name: timed(run, device) for name, run in variants.items()}, repeats)
    reference, whole = full(), flops(full)
    rows = []
    for rank in ranks:
        ratio = common.ratios(seconds["full"], seconds[str(rank)])
        rows.append(
            {
                "tokens": tokens,
                "rank": rank,
                "full_seconds": median(seconds["full"]),
                "speedup": ratio,
                "arithmetic_speedup": whole / flops(variants[str(rank)]),
                "error_random_weights": error(variants[str(rank)](), reference),
            }
        )
        print(
            f"{tokens:>6} tokens, rank {rank:>3}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}), "
            f"arithmetic {rows[-1]['arithmetic_speedup']:.2f}x, error {rows[-1]['error_random_weights']:.2f}",
            flush=True,
        )
    return rows


STEPS, MEASURED = 10, (1, 5, 8)
"""Steps of the runs with trained weights, and those whose attention is measured: early, in the middle, late."""
LIMITS = (0.02, 0.05, 0.1, 0.2)
"""Values of ``delta_prune`` for which the table says what UniCP would choose."""
LONG, CAPTIONS = 30, 4
"""Steps of whole videos, and for how many captions they are made."""
Call = tuple[tuple[Any, ...], dict[str, Any]]


def captured(pipe: Any, call: dict[str, Any], prompt: str) -> list[list[Call]]:
    """What each self-attention module is called with at the measured steps, in the first branch of guidance."""
    modules = [block.attn1 for block in pipe.transformer.blocks]
    found: list[list[Call]] = [[] for _ in modules]
    calls = [0] * len(modules)

    def note(place: int, args: Any, kwargs: Any) -> None:
        step, branch = divmod(calls[place], 2)
        calls[place] += 1
        if step in MEASURED and branch == 0:
            found[place].append((args, kwargs))

    hooks = [
        module.register_forward_pre_hook(lambda _m, a, k, place=place: note(place, a, k), with_kwargs=True)
        for place, module in enumerate(modules)
    ]
    seed = torch.Generator().manual_seed(0)
    pipe(prompt, **{**call, "num_inference_steps": STEPS}, generator=seed, output_type="latent")
    for hook in hooks:
        hook.remove()
    return found


def bases(module: Any, known: list[Call], size: int) -> list[Any]:
    """Of queries and keys, and of values, from the calls that are known: (H, d, d) each, most important first."""
    sums: list[Any] = [0.0, 0.0]
    for args, kwargs in known:
        found = moments(module, functools.partial(module, *args, **kwargs))
        sums = [total + moment for total, moment in zip(sums, found, strict=True)]
    return [basis(moment, size) for moment in sums]


def sliced(module: Any, found: list[Any], ranks: list[int]) -> dict[int, Callable[[Call], Any]]:
    """A self-attention module at each rank."""
    p_qk, p_v = found
    twins = {rank: SlicedAttention(module, p_qk[..., :rank], p_v[..., :rank], fold=True) for rank in ranks}
    return {rank: lambda call, twin=twin: twin(module.forward, *call) for rank, twin in twins.items()}  # type: ignore[misc]


@contextmanager
def projected(module: Any, found: list[Any], rank: int, parts: str) -> Iterator[None]:
    """A module whose queries and keys, values, or all of these lie in the space of so many directions.

    What it computes is what slicing computes; nothing is saved.
    """
    qk, v = (each[..., :rank] @ each[..., :rank].transpose(-1, -2) for each in found)

    def attend(call: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        turn = "bhnd,hde->bhne" if heads_first else "bnhd,hde->bnhe"
        if "k" in parts:
            query, key = (torch.einsum(turn, each, qk) for each in (query, key))
        if "v" in parts:
            value = torch.einsum(turn, value, v)
        return call(query, key, value, *args, **kwargs)

    own = module.processor
    module.processor = instrumented(own, attend)
    try:
        yield
    finally:
        module.processor = own


def videos(pipe: Any, call: dict[str, Any], ranks: list[int], prompts: list[str]) -> list[dict[str, Any]]:
    """PSNR of videos in which self-attention is sliced at every step, and of those of fewer steps."""
    size = pipe.transformer.config.attention_head_dim
    modules = [block.attn1 for block in pipe.transformer.blocks]
    known = captured(pipe, call, common.training_prompts(1)[0])
    found = [bases(module, calls, size) for module, calls in zip(modules, known, strict=True)]

    def made(steps: int) -> list[Any]:
        calls = [{"prompt": prompt, **call, "num_inference_steps": steps} for prompt in prompts]
        return [harness.generate(pipe, each, seed=0).frames for each in calls]

    whole = made(LONG)
    rows = []

    def row(what: str, others: list[Any]) -> None:
        values = [psnr(other, reference) for other, reference in zip(others, whole, strict=True)]
        rows.append({"what": what, "psnr": mean(values), "worst": min(values)})
        print(rows[-1], flush=True)

    for share in (0.9, 0.8, 0.6):
        row(f"fewer steps ({round(share * LONG)} of {LONG})", made(round(share * LONG)))
    for parts, name in (("k", "queries and keys"), ("kv", "queries, keys and values")):
        for rank in reversed(ranks):
            with ExitStack() as stack:
                for module, each in zip(modules, found, strict=True):
                    stack.enter_context(projected(module, each, rank, parts))
                row(f"{name} at rank {rank} of {size}", made(LONG))
    return rows


@torch.inference_mode(False)
@torch.no_grad()
def trained(member: str, pixels: int, repeats: int) -> dict[str, Any]:
    """Time and errors of slicing a trained model's self-attention modules, and what UniCP would choose by them."""
    pipe, own = zoo.load(member)
    pipe.set_progress_bar_config(disable=True)
    call = {**own, "height": pixels, "width": pixels}
    known = captured(pipe, call, common.training_prompts(1)[0])
    unseen = captured(pipe, call, scenes.prompts(1)[0])
    modules = [block.attn1 for block in pipe.transformer.blocks]
    size = pipe.transformer.config.attention_head_dim
    ranks = [size // 4, size // 2, 3 * size // 4]
    errors: dict[int, list[float]] = {rank: [] for rank in ranks}
    apart: dict[tuple[int, str], list[float]] = {(rank, part): [] for rank in ranks for part in ("k", "v")}
    found = [bases(module, calls, size) for module, calls in zip(modules, known, strict=True)]
    twins = [sliced(module, each, ranks) for module, each in zip(modules, found, strict=True)]
    for module, each, twin, calls in zip(modules, found, twins, unseen, strict=True):
        for args, kwargs in calls:
            reference = module(*args, **kwargs)
            for rank in ranks:
                errors[rank].append(error(twin[rank]((args, kwargs)), reference))
                for part in ("k", "v"):
                    with projected(module, each, rank, part):
                        apart[rank, part].append(error(module(*args, **kwargs), reference))
    middle = len(modules) // 2
    args, kwargs = unseen[middle][0]
    runs = {"full": functools.partial(modules[middle], *args, **kwargs)}
    runs |= {str(rank): functools.partial(twins[middle][rank], (args, kwargs)) for rank in ranks}
    seconds = common.interleaved({name: timed(run) for name, run in runs.items()}, repeats)
    whole = flops(runs["full"])
    rows = [
        {
            "rank": rank,
            "speedup": common.ratios(seconds["full"], seconds[str(rank)]),
            "arithmetic_speedup": whole / flops(runs[str(rank)]),
            "error": median(errors[rank]),
            "worst_error": max(errors[rank]),
            "error_of_queries_and_keys": median(apart[rank, "k"]),
            "error_of_values": median(apart[rank, "v"]),
            "within": {f"{limit:g}": sum(error <= limit for error in errors[rank]) for limit in LIMITS},
        }
        for rank in ranks
    ]
    about = {"member": member, "pixels": pixels, "tokens": args[0].shape[1], "head_size": size}
    counts = {"modules": len(modules), "steps": list(MEASURED), "of_steps": STEPS, "measured": len(errors[ranks[0]])}
    of_videos = {"videos": videos(pipe, own, ranks, scenes.prompts(CAPTIONS)), "captions": CAPTIONS}
    return {**about, **counts, "rows": rows, **of_videos, "size": [own["width"], own["height"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--member", help="of the proving ground: its trained weights instead")
    parser.add_argument("--pixels", type=int, default=400, help="height and width of its video")
    args = parser.parse_args()
    if args.member:
        found = trained(args.member, args.pixels, args.repeats)
        print(*found["rows"], sep="\n")
        common.save("slicing-trained", found)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for tokens in args.tokens for row in measure(tokens, args.heads, args.ranks, args.repeats, device)]
    common.save("slicing", {"head_size": SIZE, "heads": args.heads, "rows": rows})


if __name__ == "__main__":
    main()
