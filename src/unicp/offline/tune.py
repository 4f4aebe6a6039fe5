"""``unicp.tune`` makes plans for every speed from a few runs of a pipeline. It is ours, not a paper's."""

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
    leap: float = BudgetConfig.leap,
    seed: int = 0,
    progress: bool | Callable[[str, int, int], None] = True,
    checkpoint: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Profile:
    """Find the plans of least error at every cost, for :class:`BudgetConfig`.

    Every prompt is run once unaccelerated, and what its solver was given is reduced to inner products. Errors that are
    injected at some steps show how much they grow by the end. From these two, on the first half of the prompts, the
    search finds plans for every cost without further runs, under several limits. Real runs on the same half then
    compare these plans with the default plan, with other evenly spaced ones, and with plans that have the conditional
    branch alone, or UniCP inside, at every second computed step. At each cost the default plan is chosen, unless
    another one is ahead by two standard errors. The real quality of the chosen plans is measured on the other half or,
    where the default plan is kept at all costs, on all prompts, as nothing was fitted to them. With ``min_psnr``, the
    plan that will be used for it is among those that were run. With a progress bar, ``tune`` first says how long it
    will take, in unaccelerated videos.

    Args:
        pipe: a diffusers pipeline, not accelerated, with a deterministic scheduler.
        prompts: eight or more prompts of the kind that the profile will be used for; ``None`` if ``call`` carries
            ``prompt_embeds``.
        target_speedup: target of the profile's config, 1 or more; the profile serves any other target, too.
        min_psnr: target of the profile's config in dB, in place of ``target_speedup``.
        effort: ``"low"``, ``"medium"`` or ``"high"``: how many runs the search may take.
        inside: a :class:`UniCPConfig`, or a profile that :func:`calibrate` made or its path: what may act inside
            computed steps. The cost of such a step is counted in operations. The profile then holds the calibration,
            too. Not with ``"low"``.
        leap: as in :class:`BudgetConfig`: share of the run in which a multistep solver may take longer steps. With 0
            the plans are for hosts whose solver takes each step (SGLang-Diffusion, vLLM-Omni).
        seed: the noise of prompt i is drawn on the CPU from ``seed + i``.
        progress: whether to show a progress bar, or a function to call with what is done, the step and the number of
            steps.
        checkpoint: path of a file with the results so far, from which an interrupted tuning resumes; it is removed at
            the end.
        **call: arguments of the pipeline's call.

    Returns:
        The profile; ``save`` writes it.

    Raises:
        UnicpError: the pipeline is accelerated, its scheduler draws noise, a target is out of range, ``inside`` is
            not for this pipeline or effort, ``call`` carries a generator, the run begins in the middle (``strength``)
            or has fewer than four steps, or the checkpoint is of another model, its weights or prompts.

    Warns:
        UnicpWarning: no plan that skips a step reaches the target; the profile still serves lower ones. Or fewer than
            eight prompts judge ``min_psnr``, which cannot promise it with much confidence: because fewer were given, or
            because fewer than sixteen were given and plans were fitted to half of them.
    """
    check_choice("effort", effort, tuple(EFFORTS))
    config = BudgetConfig(target_speedup=target_speedup, min_psnr=min_psnr, leap=leap)
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
        accelerate(pipe, acting).restore()  # refuses a profile of another model before any run
    texts: list[str | None] = [None] if prompts is None else [str(prompt) for prompt in prompts]
    if min_psnr is not None and len(texts) < MIN_PROMPTS_FOR_BOUND:
        warnings.warn(
            f"of {len(texts)} prompts, min_psnr promises little for others; {MIN_PROMPTS_FOR_BOUND} or more say with "
            "80% confidence what four of five reach",
            UnicpWarning,
            stacklevel=2,
        )
    tuner = Tuner(pipe, denoisers, texts, call, seed, EFFORTS[effort], acting, checkpoint, leap)
    runs = cost_in_runs(len(texts), effort, acting is not None)
    work = f"{len(texts)} prompts, effort {effort}: about as long as {runs:.0f} unaccelerated videos"
    with progress_bar(progress, "tuning", work) as show:
        return tuner.profile(config, show)
