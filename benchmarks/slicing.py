"""Sliced against full attention of one module (PCAS), by sequence length: time, operations, error.

    python -m benchmarks.slicing [--tokens 1024 4096 16384] [--heads 4] [--ranks 32 64 96]

A self-attention module of the Wan architecture with head size 128 and random weights, with rotary embedding, on random
hidden states: the whole module is timed, projections included. Speed does not depend on what the weights are. The error
does: random weights have no preferred directions, so the one here is the worst there is; what a trained model loses is
in its profile (``unicp inspect``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from benchmarks import common
from unicp.engine.fills.units import output_change, worst
from unicp.engine.slicing.attention import SlicedAttention, basis, instrumented, second_moments
from unicp.tensors.flops import Counter

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

    def timed(run: Callable[[], Any]) -> Callable[[], float]:
        def once() -> float:
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        return once

    seconds = common.interleaved({name: timed(run) for name, run in variants.items()}, repeats)
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
                "error_random_weights": float(worst(output_change(variants[str(rank)](), reference, 1))),
            }
        )
        print(
            f"{tokens:>6} tokens, rank {rank:>3}: {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}), "
            f"arithmetic {rows[-1]['arithmetic_speedup']:.2f}x, error {rows[-1]['error_random_weights']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for tokens in args.tokens for row in measure(tokens, args.heads, args.ranks, args.repeats, device)]
    common.save("slicing", {"head_size": SIZE, "heads": args.heads, "rows": rows})


if __name__ == "__main__":
    main()
