"""``unicp.tune`` makes plans for every speed from a few runs of a pipeline. It is ours, not a paper's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UnicpError, UnicpWarning
from ..hosts.diffusers import hooks
from ..hosts.diffusers.components import find_denoisers
from ..policies.budget import MIN_PROMPTS_FOR_BOUND, BudgetConfig
from ..policies.config import check_choice, check_number
from ..profiles import Profile
from ..progress import progress_bar
from .candidates import EFFORTS, cost_in_runs
from .runs import check_prompts
from .trials import Tuner


def tune(
    pipe: Any,
    prompts: Sequence[str] | None,
    *,
    target_speedup: float | None = None,
    min_psnr: float | None = None,
    effort: str = "medium",
    leap: float = BudgetConfig.leap,
    seed: int = 0,
    progress: bool | Callable[[str, int, int], None] = True,
    checkpoint: str | os.PathLike[str] | None = None,
    **call: Any,
) -> Profile:
    """Find good plans at every cost, for :class:`BudgetConfig`, and what quality they reach.

    Every prompt is run once unaccelerated. Then real runs on three quarters of the prompts (on half of them for
    ``min_psnr``) compare the default plan with plans of other shapes, by how many first and last steps they compute; at
    each prompt the worse half of the shapes drops out. At each cost the default plan is kept, unless another one is
    surely ahead, by a t-test of the prompts at 97.5%. The real quality of the chosen plans is measured on the other
    prompts or, where the default plan is kept at all costs, on all of them, as nothing was fitted to them. With
    ``min_psnr``, the plan that will be used for it is among those that were run. With a progress bar, ``tune`` first
    says how long it will take, in unaccelerated videos.

    Args:
        pipe: a diffusers pipeline, not accelerated, with a deterministic scheduler.
        prompts: four or more prompts of the kind that the profile will be used for, sixteen for ``min_psnr``; of one
            to three, the default plan is kept or nearly always so. ``None`` if ``call`` carries ``prompt_embeds``.
        target_speedup: target of the profile's config, 1 or more; the profile serves any other target, too.
        min_psnr: target of the profile's config in dB, in place of ``target_speedup``.
        effort: ``"low"``, ``"medium"`` or ``"high"``: how many shapes of plans are compared.
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
        UnicpError: the pipeline is accelerated, its scheduler draws noise, a target is out of range, ``call`` carries a
            generator, the run begins in the middle (``strength``) or has fewer than four steps, or the checkpoint is of
            another model, its weights or prompts.

    Warns:
        UnicpWarning: no plan that skips a step reaches the target; the profile still serves lower ones. Or fewer than
            eight prompts judge ``min_psnr``, which cannot promise it with much confidence: because fewer were given, or
            because fewer than sixteen were given and plans were chosen on half of them.
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
    texts: list[str | None] = [None] if prompts is None else list(prompts)
    if min_psnr is not None and len(texts) < MIN_PROMPTS_FOR_BOUND:
        warnings.warn(
            f"of {len(texts)} prompts, min_psnr promises little for others; {MIN_PROMPTS_FOR_BOUND} or more say with "
            "80% confidence what four of five reach",
            UnicpWarning,
            stacklevel=2,
        )
    promised = min_psnr is not None
    tuner = Tuner(pipe, denoisers, texts, call, seed, EFFORTS[effort], checkpoint, leap, min_psnr=promised)
    runs = cost_in_runs(len(texts), effort, promised)
    work = f"{len(texts)} prompts, effort {effort}: about as long as {runs:.0f} unaccelerated videos"
    with progress_bar(progress, "tuning", work) as show:
        return tuner.profile(config, show)
