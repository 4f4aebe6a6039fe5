"""AdaCache as its authors wrote it: two residuals a block are cached and added one by one. Slow, literal, for Wan.

Shares no code with ``unicp``. A copy of the transformer gets blocks whose forward is written out here; the loop makes
the decision of each step by the rule of the paper (arXiv 2411.02397, section 4.2) with the normaliser, the forced
steps and the Motion Regularization of the reference implementation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Trace:
    """What happened: which steps were computed, and what was measured at them."""

    computed: list[int] = field(default_factory=list)
    changes: list[float | None] = field(default_factory=list)
    motions: list[float | None] = field(default_factory=list)


class Block:
    """One transformer block of Wan with its two cached residuals for each guidance branch."""

    def __init__(self, block: torch.nn.Module, state: State) -> None:
        self.block = block
        self.state = state
        self.attention: dict[str, torch.Tensor] = {}
        self.rest: dict[str, torch.Tensor] = {}

    def forward(
        self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        block, branch = self.block, self.state.branch
        if self.state.compute:
            table = block.scale_shift_table + time  # (B, 6, C)
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[:, i : i + 1] for i in range(6))
            attention = block.attn1(block.norm1(x) * (1 + scale) + shift, None, None, rotary) * gate
            y = x + attention
            cross = block.attn2(block.norm2(y), text, None, None)
            z = y + cross
            mlp = block.ffn(block.norm3(z) * (1 + scale_mlp) + shift_mlp) * gate_mlp
            self.attention[branch], self.rest[branch] = attention, cross + mlp
        x = x + self.attention[branch]
        return x + self.rest[branch]


class State:
    """What the blocks have to know."""

    compute = True
    branch = ""


def relative_change(new: torch.Tensor, old: torch.Tensor) -> float:
    """The worst sample's sum|new - old| / sum|old|."""
    return max(float((a - b).abs().sum() / b.abs().sum()) for a, b in zip(new, old, strict=True))


def motion(p: torch.Tensor, frames: int, strides: Sequence[int]) -> float | None:
    """The largest of the samples' mean over strides of sum|p[k:] - p[:-k]| / (sum|p[k:]| + sum|p[:-k]|)."""
    strides = [k for k in strides if k < frames]
    if not strides:
        return None
    scores = []
    for sample in p.reshape(p.shape[0], frames, -1):  # (F, S*C)
        total = 0.0
        for k in strides:
            late, early = sample[k:], sample[: frames - k]
            total += float((late - early).abs().sum() / (late.abs().sum() + early.abs().sum()))
        scores.append(total / len(strides))
    return max(scores)


def sample(
    transformer: torch.nn.Module,
    latents: torch.Tensor,
    texts: dict[str, torch.Tensor],
    sigmas: Sequence[float],
    codebook: Sequence[tuple[float, int]],
    *,
    guidance: float = 4.0,
    moreg: str | None = None,
    scale: float = 0.385,
    power: float = 8.0,
    gradient_weight: float = 10.0,
    window: tuple[float, float] = (0.1, 0.9),
    strides: Sequence[int] = (1,),
) -> tuple[torch.Tensor, Trace]:
    """Euler steps over ``sigmas`` (the last is where they end) with two-call guidance.

    Args:
        latents: (B, C, F, H, W) noise.
        texts: embeddings of the branches, "cond" first.
        moreg: ``None``, ``"reference"`` or ``"paper"``.
    """
    model = copy.deepcopy(transformer)
    state = State()
    blocks = [Block(block, state) for block in model.blocks]
    for module, block in zip(model.blocks, blocks, strict=True):
        module.forward = block.forward
    middle = blocks[len(blocks) // 2]
    steps, frames = len(sigmas) - 1, latents.shape[2]
    trace = Trace()
    old: torch.Tensor | None = None
    rate, m_old, next_computed = 1, 1.0, 0
    for step in range(steps):
        forced = step in (0, 1, steps - 2, steps - 1)
        state.compute = forced or step >= next_computed
        outputs = {}
        for branch, text in texts.items():
            state.branch = branch
            time = torch.full((latents.shape[0],), sigmas[step] * 1000, dtype=latents.dtype)
            outputs[branch] = model(latents, time, text, return_dict=False)[0]
        if state.compute:
            new = middle.attention["cond"]
            change = None if old is None else relative_change(new, old)
            m = motion(new, frames, strides) if moreg else None
            trace.computed.append(step)
            trace.changes.append(change)
            trace.motions.append(m)
            if change is None:
                rate = 1
            else:
                c = change / rate
                if moreg:
                    active = window[0] * steps <= step <= window[1] * steps
                    m_new = (m / scale) ** power if active and m is not None else 1.0
                    g = gradient_weight * (m_new - m_old) / rate
                    c = c * (m_new + (abs(g) if moreg == "reference" else g))
                    m_old = m_new
                rate = next((r for threshold, r in codebook if threshold > c), codebook[-1][1])
            next_computed = step + rate
            old = new
        guided = outputs["uncond"] + guidance * (outputs["cond"] - outputs["uncond"])
        latents = latents + (sigmas[step + 1] - sigmas[step]) * guided
    return latents, trace
