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
                    self.window = min(self.window + 1, self.max_window + 1)  # so many steps are kept, and the next runs
                    while self.window > 1 and per_step * self.window > self.delta:
                        self.window -= 1
            self.due = step + self.window
            self.computed_at = step
        self.kept[branch] = output
        return output


class Together:
    """Units that share one window, online: at each step all of them run, or all are forecast.

    The denoiser is called once a branch and step; the first branch measures, the others follow.
    """

    def __init__(
        self, sigmas: Sequence[float], branches: int, max_window: int, warmup: int, cooldown: int, damping: float
    ) -> None:
        self.sigmas, self.branches, self.max_window = sigmas, branches, max_window
        self.warmup, self.cooldown, self.damping = warmup, cooldown, damping
        self.computed: list[int] = []
        self.errors: list[tuple[float, float]] = []  # limit and error of each, at the last computed step
        self.window = 1
        self.due = 0
        self.trace: list[str] = []

    def begin(self, step: int) -> None:
        if step < len(self.trace):
            return
        if self.computed and self.computed[-1] == step - 1:
            self.set_window()
        forced = step < self.warmup or step >= len(self.sigmas) - self.cooldown or len(self.computed) < 2
        self.trace.append("compute" if forced or step >= self.due else "forecast")
        if self.trace[-1] == "compute":
            self.computed.append(step)
            self.errors = []

    def set_window(self) -> None:
        t, window = self.computed[-1], 1
        if len(self.computed) > 2:
            limit = self.errors[0][0]
            error = sum(e * limit / own for own, e in self.errors) / len(self.errors)
            s, r = self.computed[-2], self.computed[-3]
            # A line through s and r is off by f''/2 times the product of the distances to both.
            half_curvature = error / ((self.sigmas[s] - self.sigmas[t]) * (self.sigmas[r] - self.sigmas[t]))
            if error <= limit:
                window = min(self.window + 1, self.max_window + 1)
                while window > 1:
                    at = self.sigmas[t + window] if t + window < len(self.sigmas) else 0.0
                    if half_curvature * (self.sigmas[t] - at) * (self.sigmas[s] - at) <= limit:
                        break
                    window -= 1
        self.window, self.due = window, t + window


class Forecasting(torch.nn.Module):
    """A module that runs or is forecast as the window says that it shares with others."""

    def __init__(self, inner: torch.nn.Module, together: Together, limit: float) -> None:
        super().__init__()
        self.inner, self.limit = inner, limit
        self.window = [together]  # in a list: it is no submodule
        self.calls = 0
        self.kept: dict[int, list[tuple[float, torch.Tensor]]] = {}

    def forecast(self, branch: int, sigma: float, damping: float) -> torch.Tensor:
        (s, newest), *older = self.kept[branch]
        if not older:
            return newest
        r, before = older[0]
        distance = (s - sigma) / (r - s)  # in spacings
        factor = distance * damping ** max(0.0, distance - 1)
        return torch.lerp(before, newest, round(1 + factor, 12))  # before + (1 + factor) * (newest - before)

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        together = self.window[0]
        step, branch = divmod(self.calls, together.branches)
        self.calls += 1
        together.begin(step)
        sigma = together.sigmas[step]
        if together.trace[-1] == "forecast":
            return self.forecast(branch, sigma, together.damping)
        output: torch.Tensor = self.inner(*args, **kwargs)
        if branch == 0 and step > 0:
            line = self.forecast(0, sigma, together.damping)
            errors = [float((a - b).abs().sum() / b.abs().sum()) for a, b in zip(output, line, strict=True)]
            together.errors.append((self.limit, max(errors)))
        self.kept[branch] = [(sigma, output), *self.kept.get(branch, [])[:1]]
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
