"""``unicp.tune``: from a few runs of a pipeline to plans for every speed. Ours, not a paper's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnicpError, UnicpWarning
from ..hosts.diffusers import hooks
from ..hosts.diffusers.components import find_denoisers
from ..hosts.diffusers.session import accelerate
from ..policies.budget import BudgetConfig
from ..policies.config import check_choice, check_number
from ..profiles import Profile
from ..progress import progress_bar
from .candidates import EFFORTS, acting_inside, cost_in_runs
from .runs import check_prompts
from .trials import MIN_PROMPTS_FOR_BOUND, Tuner


def tune(
    pipe: Any,
    prompts: Sequence[str] | None,
    *,
    target_speedup: float | None = None,
    min_psnr: float | None = None,
    effort: str = "medium",
    inside: Any = None,
    seed: int = 0,
    progress: bool | Callable[[str, int, int], None] = True,
    checkpoint: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Profile:
    """Find the plans of least error at every cost, for :class:`BudgetConfig`.

    Every prompt is run once as it is; what its solver was given is reduced to inner products. Errors injected at some
    steps tell how much they grow by the end. From both, on the first half of the prompts, plans for every cost follow
    without further runs, within several limits of the search. Among them, the default plan, other ones with even gaps
    and ones with the conditional branch alone, or UniCP inside, at every second computed step, real runs on that half
    choose at each cost: the default plan, unless another one is ahead by two standard errors. The chosen plans' real
    quality is measured on the other half, or, where the default plan is kept at all costs, on all: nothing was made to
    fit them. With a progress bar, it says first about how many videos' time it will take.
    With ``min_psnr``, the plan that will be played for it is among them.

    Args:
        pipe: a diffusers pipeline, not accelerated, with a deterministic scheduler.
        prompts: eight or more of the kind it will be used for, four at the least; ``None`` if ``call`` carries
            ``prompt_embeds``.
        target_speedup: what the profile's config asks for; any other target can be asked of it later.
        min_psnr: or this, in dB; not both.
        effort: ``"low"``, ``"medium"`` or ``"high"``.
        inside: a :class:`UniCPConfig`, or the path of a profile that :func:`calibrate` made: what may act inside
            computed steps. What such a step costs is timed. The profile then holds the calibration, too. Not with
            ``"low"``.
        seed: noise of prompt i is drawn on the CPU from ``seed + i``.
        progress: show a progress bar, or a function that is given what is done, the step and the number of steps.
        checkpoint: a file that holds what is done so far; it is removed at the end.
        **call: arguments of the pipeline's call.

    Returns:
        The profile; ``save`` writes it.

    Raises:
        UnicpError: the pipeline is accelerated, its scheduler draws noise, a target is out of range, ``inside`` is
            not for this pipeline or effort, ``call`` carries a generator, the run begins in the middle (``strength``)
            or has fewer than four steps, or the checkpoint is of another model, its weights or prompts.

    Warns:
        UnicpWarning: no plan reaches the target, or none that skips a step; the profile is good for lower ones. Or
            ``min_psnr`` is judged by fewer than eight prompts, which cannot promise it with much confidence: fewer were
            given, or fewer than sixteen and half of them had plans made to fit them.
    """
    check_choice("effort", effort, tuple(EFFORTS))
    config = BudgetConfig(target_speedup=target_speedup, min_psnr=min_psnr)
    denoisers, given = find_denoisers(pipe)
    if given is None:
        raise UnicpError("tune runs a pipeline: pass the pipeline, not its transformer")
    check_prompts(prompts, call)
    if call.get("generator") is not None:
        raise UnicpError("tune draws the noise of every prompt itself, from seed; leave generator out")
    check_number("seed", seed, low=0, whole=True)
    if any(hooks.find(denoiser, hooks.DENOISER_HOOK) is not None for denoiser in denoisers.values()):
        raise UnicpError("the pipeline is accelerated; tune measures it as it is: unicp.restore(pipe) first")
    acting = acting_inside(inside, effort) if inside is not None else None
    if acting is not None:
        accelerate(pipe, acting).restore()  # refused before any run, where it is of another model
    texts: list[str | None] = [None] if prompts is None else [str(prompt) for prompt in prompts]
    if min_psnr is not None and len(texts) < MIN_PROMPTS_FOR_BOUND:
        warnings.warn(
            f"of {len(texts)} prompts, min_psnr promises little for others; {MIN_PROMPTS_FOR_BOUND} or more say with "
            "80% confidence what four of five reach",
            UnicpWarning,
            stacklevel=2,
        )
    tuner = Tuner(pipe, denoisers, texts, call, seed, EFFORTS[effort], acting, checkpoint)
    runs = cost_in_runs(len(texts), effort, acting is not None)
    work = f"{len(texts)} prompts, effort {effort}: about as long as {runs:.0f} unaccelerated videos"
    with progress_bar(progress, "tuning", work) as show:
        return tuner.profile(config, show)
