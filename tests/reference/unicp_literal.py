"""UniCP written out slowly: the plan of one module, a module that caches itself, and sliced attention head by head.

Shares no code with ``unicp``. The paper (arXiv 2502.04393) has no implementation to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def profiled_plan(
    errors: Sequence[Sequence[float]],
    *,
    delta: float,
    max_window: int,
    warmup: int,
    cooldown: int,
    sliced: float | None = None,
    delta_prune: float = 0.0,
    refresh: bool = False,
) -> list[str]:
    """EDCW from a profile, with DWS in its mode "switch": what one module does at each step of a run.

    ``errors[t][k - 1]`` is E[m, t, k]; ``sliced`` is E_prune. The plan is laid out window by window.
    """
    count = len(errors)

    def window(anchor: int) -> int:
        longest = 0
        for k in range(1, max_window + 1):
            if k > len(errors[anchor]) or not errors[anchor][k - 1] <= delta or delta == 0:
                break
            longest = k
        return longest

    def is_forced(step: int) -> bool:
        return step < warmup or step >= count - cooldown

    plan: list[str] = []
    step = 0
    while step < count:
        may_slice = sliced is not None and delta_prune > 0 and sliced <= delta_prune and not is_forced(step)
        if may_slice and not refresh and window(step) > 0:
            may_slice = False  # a window begins here, and what it keeps must be whole
        plan.append("slice" if may_slice else "compute")
        anchored = refresh or not may_slice
        step += 1
        if not anchored:
            continue
        for _ in range(window(step - 1)):
            if step >= count or is_forced(step):
                break
            plan.append("reuse")
            step += 1
    return plan


class SelfCaching(torch.nn.Module):
    """A module that decides for itself, online, when to run: one window, one kept output for each branch.

    The denoiser is called once a branch and step; the first branch measures, the others follow.
    """

    def __init__(
        self,
        inner: torch.nn.Module,
        steps: int,
        branches: int,
        delta: float,
        max_window: int,
        warmup: int,
        cooldown: int,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.steps, self.branches, self.delta, self.max_window = steps, branches, delta, max_window
        self.warmup, self.cooldown = warmup, cooldown
        self.calls = 0
        self.window = 1
        self.due = 0
        self.computed_at = 0
        self.kept: dict[int, torch.Tensor] = {}
        self.trace: list[str] = []

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        step, branch = divmod(self.calls, self.branches)
        self.calls += 1
        if branch == 0:
            forced = step < self.warmup or step >= self.steps - self.cooldown
            self.trace.append("compute" if forced or step >= self.due else "reuse")
        if self.trace[-1] == "reuse":
            return self.kept[branch]
        output: torch.Tensor = self.inner(*args, **kwargs)
        if branch == 0:
            if step == 0:
                self.window = 1
            else:
                old = self.kept[0]
                e = max(float((a - b).abs().sum() / b.abs().sum()) for a, b in zip(output, old, strict=True))
                per_step = e / (step - self.computed_at)
                if e > self.delta:
                    self.window = 1
                else:
                    self.window = min(self.window + 1, self.max_window)
                    while self.window > 1 and per_step * self.window > self.delta:
                        self.window -= 1
            self.due = step + self.window
            self.computed_at = step
        self.kept[branch] = output
        return output


def sliced_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p_qk: torch.Tensor, p_v: torch.Tensor
) -> torch.Tensor:
    """Sliced attention of (B, H, T, d), one sample and one head at a time, in float64."""
    batch, heads, _, size = query.shape
    out = torch.empty_like(query, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            p, p_value = p_qk[h].double(), p_v[h].double()
            q, k, v = query[b, h].double() @ p, key[b, h].double() @ p, value[b, h].double() @ p_value
            scores = torch.softmax(q @ k.T / math.sqrt(size), dim=-1)
            out[b, h] = (scores @ v) @ p_value.T
    return out
