"""AdaCache with Motion Regularization: Kahatapitiya et al., arXiv 2411.02397, and its reference implementation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from ..errors import UnicpError
from .base import NO_COUNT_NOTE, Decision, Needs, Policy, Step, no_numbers
from .config import Config, check_choice, check_flag, check_number, check_tuple, register


class Codebook(NamedTuple):
    """Entries (threshold, rate), and the number of denoising steps they were made for."""

    entries: tuple[tuple[float, int], ...]
    steps: int
    source: str


CODEBOOKS: dict[str, Codebook] = {
    "opensora-30-fast": Codebook(
        ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.00, 1)), 30, "published with AdaCache"
    ),
    "opensora-30-slow": Codebook(
        ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.00, 1)), 30, "published with AdaCache"
    ),
    "opensora-100-fast": Codebook(
        ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.00, 3)), 100, "published with AdaCache"
    ),
    "demo-50": Codebook(
        ((0.039, 4), (0.05, 3), (0.07, 2), (1.0, 1)), 50, "ours, derived from the demo model: benchmarks/codebook.py"
    ),
}
"""Codebooks by name. Only the three for Open-Sora come from the paper."""

METRIC_KINDS = ("self_attention", "cross_attention", "mlp", "block")
LOCATIONS = ("start", "mid", "end", "all")


def rescale(entries: tuple[tuple[float, int], ...], made_for: int, steps: int) -> tuple[tuple[float, int], ...]:
    """A codebook for another number of denoising steps (ours; the paper has none).

    The change between neighbouring steps shrinks about as one over their number, so thresholds scale by
    ``made_for / steps`` and rates by its inverse, rounded, never below 1.

    >>> rescale(((0.1, 4), (1.0, 1)), 50, 100)
    ((0.05, 8), (0.5, 2))
    """
    factor = steps / made_for
    return tuple((threshold / factor, max(1, int(rate * factor + 0.5))) for threshold, rate in entries)


@dataclass(frozen=True, kw_only=True)
class AdaCacheConfig(Config):
    """AdaCache: cache the residual of all blocks for as many steps as a codebook allows for the measured change.

    At a computed step the residual that self-attention adds to the hidden states in the middle block is compared
    with that of the last computed step: ``c = sum|p_t - p_s| / sum|p_s| / rate``. The first codebook entry whose
    threshold lies above ``c`` gives the next rate ``r``: the next ``r - 1`` steps reuse.

    Where we differ from the reference implementation: one tensor (the stack's residual) is kept instead of four per
    block, which gives the same sum (tests/reference/adacache_per_block.py); the change of a batch is that of its most
    different sample; all state is reset for every video; codebooks are rescaled to other step counts.

    Attributes:
        codebook: a name from :data:`CODEBOOKS`, or entries ((threshold, rate), ...) with rising thresholds of 0 or more
            and whole rates of 1 or more. ``((1.0, 1),)`` computes every step. The paper's three were made for Open-Sora
            at 30 and 100 steps; ``"demo-50"`` is ours, for the demo model at 50.
        rescale: fit a named codebook to the run's number of steps (:func:`rescale`; ours).
        moreg: multiply the change by the Motion Regularization, so that videos that move more reuse less.
        moreg_form: ``"reference"`` is ``m + |g|`` (the published code), ``"paper"`` is ``m + g`` (section 4.3).
        moreg_scale, moreg_power: ``m = (motion / scale) ** power``. The constants of the reference belong to
            Open-Sora; for another model take the median motion score over some prompts as the scale.
        moreg_gradient: weight of the motion gradient ``g = weight * (m_t - m_s) / rate``.
        moreg_window: part of the run in which ``m`` is used, as fractions of the number of steps. Outside that window,
            where the number of steps is unknown, and for a single frame, ``m`` is 1.
        moreg_strides: distances, in token frames, of the compared frames.
        metric_location: block(s) that are measured: ``"start"``, ``"mid"``, ``"end"`` or ``"all"`` (paper, ablation).
            In models with separate temporal attention, only temporal blocks are measured.
        metric_kind: sub-layer whose residual, after its gate, is measured: ``"self_attention"``,
            ``"cross_attention"``, ``"mlp"`` or the whole ``"block"``.
        guidance: ``"shared"`` takes one decision per step, by the branch that is called first; ``"separate"`` takes one
            for each branch.
        fill: ``"residual"`` adds the cached stack residual (the paper). ``"forecast"`` extrapolates the denoiser's
            output along sigma, and no part of the denoiser runs at a skipped step (ours).
        correct: for ``"forecast"``: at a computed step, correct for the errors of the forecasts before it, as far as
            the new output shows them (ours; docs/methods/budget.md).
        damping: for ``"forecast"``: weight of the extrapolation per spacing of the last outputs, 0 to 1 (see
            ``ScheduleConfig``).
        warmup_steps, cooldown_steps: first and last steps that are always computed (reference: 2 and 2).

    Raises:
        UnicpError: a value is out of range, or thresholds do not rise.

    >>> AdaCacheConfig(codebook=((0.1, 3), (1.0, 1))).codebook
    ((0.1, 3), (1.0, 1))
    """

    method: ClassVar[str] = "adacache"

    codebook: str | tuple[tuple[float, int], ...] = "demo-50"
    rescale: bool = True
    moreg: bool = False
    moreg_form: str = "reference"
    moreg_scale: float = 0.385
    moreg_power: float = 8.0
    moreg_gradient: float = 10.0
    moreg_window: tuple[float, float] = (0.1, 0.9)
    moreg_strides: tuple[int, ...] = (1,)
    metric_location: str = "mid"
    metric_kind: str = "self_attention"
    guidance: str = "shared"
    fill: str = "residual"
    correct: bool = True
    damping: float = 0.85
    warmup_steps: int = 2
    cooldown_steps: int = 2

    @classmethod
    def curves(cls, steps: int) -> dict[str, dict[str, Config]]:
        """The default codebook with its thresholds scaled, with the paper's fill, with MoReg, and with our forecast."""
        book = CODEBOOKS[str(cls.codebook)]
        entries = rescale(book.entries, book.steps, steps)
        scaled = {
            f"thresholds x {factor:g}": tuple((threshold * factor, rate) for threshold, rate in entries)
            for factor in (0.6, 1.0, 1.5, 2.5)
        }
        variants: dict[str, dict[str, Any]] = {"": {}, "-moreg": {"moreg": True}, "-forecast": {"fill": "forecast"}}
        return {
            cls.method + suffix: {label: cls(codebook=book, **more) for label, book in scaled.items()}
            for suffix, more in variants.items()
        }

    def __post_init__(self) -> None:
        if isinstance(self.codebook, str):
            check_choice("codebook", self.codebook, tuple(CODEBOOKS))
        else:
            object.__setattr__(self, "codebook", _check_codebook(self.codebook))
        check_choice("moreg_form", self.moreg_form, ("reference", "paper"))
        check_choice("metric_location", self.metric_location, LOCATIONS)
        check_choice("metric_kind", self.metric_kind, METRIC_KINDS)
        check_choice("guidance", self.guidance, ("shared", "separate"))
        check_choice("fill", self.fill, ("residual", "forecast"))
        for name in ("rescale", "moreg", "correct"):
            check_flag(name, getattr(self, name))
        for name in ("moreg_scale", "moreg_power"):
            check_number(name, getattr(self, name), low=1e-9)
        check_number("moreg_gradient", self.moreg_gradient, low=0)
        check_number("damping", self.damping, low=0, high=1)
        check_number("warmup_steps", self.warmup_steps, low=1, whole=True)
        check_number("cooldown_steps", self.cooldown_steps, low=0, whole=True)
        for name in ("moreg_window", "moreg_strides"):
            object.__setattr__(self, name, check_tuple(name, getattr(self, name)))
        for fraction in self.moreg_window:
            check_number("a fraction of moreg_window", fraction, low=0, high=1)
        if len(self.moreg_window) != 2 or self.moreg_window[0] > self.moreg_window[1]:
            raise UnicpError(f"moreg_window must be two rising fractions from 0 to 1, got {self.moreg_window!r}")
        if not self.moreg_strides:
            raise UnicpError("moreg_strides must hold at least one frame distance, got ()")
        for stride in self.moreg_strides:
            check_number("a stride of moreg_strides", stride, low=1, whole=True)


def _check_codebook(codebook: Any) -> tuple[tuple[float, int], ...]:
    try:
        entries = tuple((threshold, rate) for threshold, rate in codebook)
    except (TypeError, ValueError):
        raise UnicpError(
            f"codebook must be a name or entries like ((0.05, 4), (0.15, 2), (1.0, 1)), got {codebook!r:.80}"
        ) from None
    if not entries:
        raise UnicpError("codebook must have entries, got (); ((1.0, 1),) computes every step")
    for threshold, rate in entries:
        check_number("a threshold of the codebook", threshold, low=0)
        check_number("a rate of the codebook", rate, low=1, whole=True)
    thresholds = [threshold for threshold, _ in entries]
    if any(a >= b for a, b in pairwise(thresholds)):
        raise UnicpError(f"thresholds of the codebook must rise, got {', '.join(map(str, thresholds)):.80}")
    return entries


@register(AdaCacheConfig)
class AdaCachePolicy(Policy):
    """The state machine of :class:`AdaCacheConfig` for one generation (and one branch, if they decide apart)."""

    def __init__(self, config: AdaCacheConfig) -> None:
        self.config = config
        self.next_compute = 0
        self.rate = 1
        self.last_motion = 1.0
        self.smallest: float | None = None
        self.longest = 1
        self.observed = 0
        self.broken = 0
        self.endless = False  # the number of steps is unknown

    def needs(self) -> Needs:
        config = self.config
        return Needs(
            keep="stack" if config.fill == "residual" else "output",
            order=0 if config.fill == "residual" else 1,
            correct=config.correct and config.fill == "forecast",
            weights=config.correct and config.fill == "forecast",
            steadiness=config.fill == "forecast",
            metric=config.metric_kind,
            location=config.metric_location,
            strides=config.moreg_strides if config.moreg else (),
            separate=config.guidance == "separate",
        )

    def decide(self, step: Step) -> Decision:
        config = self.config
        self.endless = step.count is None and config.cooldown_steps > 0
        forced = step.position < config.warmup_steps or step.is_last(config.cooldown_steps)
        if forced or step.index >= self.next_compute:
            return Decision(action="compute")
        if config.fill == "residual":
            return Decision(action="reuse")
        return Decision(action="forecast", damping=config.damping)

    def observe(self, step: Step, change: float | None, motion: float | None) -> None:
        self.observed += 1
        if change is None:
            self.broken += self.observed > 1  # at the first computed step there is nothing to compare with
            self.rate = 1
        else:
            # The reference divides by the rate that was scheduled; the paper's formula has no normaliser, but its
            # published thresholds only make sense with one.
            c = change / self.rate
            if self.config.moreg:
                c *= self._motion_regularization(step, motion)
            self.broken += not math.isfinite(c)
            if c == c:
                self.smallest = c if self.smallest is None else min(self.smallest, c)
            self.rate = self._lookup(c, step.count)
        self.longest = max(self.longest, self.rate)
        self.next_compute = step.index + self.rate

    def _motion_regularization(self, step: Step, motion: float | None) -> float:
        config = self.config
        low, high = config.moreg_window
        m = 1.0
        if motion is not None and step.count is not None and low * step.count <= step.index <= high * step.count:
            try:
                m = (motion / config.moreg_scale) ** config.moreg_power
            except OverflowError:
                m = float("inf")
        # As in the reference, the gradient also sees the edges of the window, where m comes from 1 and goes back to it.
        gradient = config.moreg_gradient * (m - self.last_motion) / self.rate
        self.last_motion = m
        return m + (abs(gradient) if config.moreg_form == "reference" else gradient)

    def entries(self, count: int | None) -> tuple[tuple[float, int], ...]:
        """The codebook in force for a run of ``count`` steps."""
        config = self.config
        if not isinstance(config.codebook, str):
            return config.codebook
        named = CODEBOOKS[config.codebook]
        if not config.rescale or count is None or count == named.steps:
            return named.entries
        return rescale(named.entries, named.steps, count)

    def _lookup(self, c: float, count: int | None) -> int:
        if c != c:  # not a number: never a reason to reuse
            return 1
        entries = self.entries(count)
        for threshold, rate in entries:
            if c < threshold:
                return rate
        return entries[-1][1] if c != float("inf") else 1

    def notes(self) -> list[str]:
        said = (
            [NO_COUNT_NOTE.format(so="cooldown_steps cannot be kept to, nor a codebook rescaled")]
            if self.endless
            else []
        )
        return said + ([no_numbers(self.broken)] if self.broken else [])

    def why_idle(self) -> str:
        if not isinstance(self.config.codebook, str) and all(rate == 1 for _, rate in self.config.codebook):
            return "every rate of its codebook is 1; give some thresholds a rate of 2 or more"
        if self.smallest is None or self.longest > 1:
            return "the run was too short to reuse anything between its forced first and last steps; give more steps"
        return (
            f"the smallest change per step it measured, {self.smallest:.3g}, lies above every threshold whose rate "
            "exceeds 1; raise the thresholds of the codebook"
        )
