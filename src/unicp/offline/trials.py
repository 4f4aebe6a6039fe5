"""One tuning: the runs that it makes, and the decisions that follow from them. It is ours, not a paper's."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import UnicpError, UnicpWarning
from ..files.checkpoint import Checkpoint
from ..hosts.diffusers.session import accelerate
from ..policies.base import Step
from ..policies.budget import MIN_PROMPTS_FOR_BOUND, BudgetConfig, BudgetPolicy, PlanBook, Priced
from ..policies.plans.step_plan import StepPlan, computing, nearest
from ..profiles import Profile
from ..profiles.identity import fingerprint, identity, settings, weights_digest
from ..tensors import metrics
from .candidates import CHOICE_SPEEDUPS, DEFAULT_KIND, Effort, choosing, ranked, remaining
from .expectation import MAX_PSNR_DB, PlanResult, book, gram
from .replay import Player, Take
from .runs import own_bar_hidden

MIN_STEPS = 4
"""Fewest steps of a run for which plans can be made: the default plan computes at least three."""


class Tuner:
    """One tuning and its results so far."""

    def __init__(
        self, pipe: Any, denoisers: dict[str, Any], prompts: list[str | None], call: dict[str, Any], seed: int,
        effort: Effort, checkpoint: str | os.PathLike[str] | None, leap: float = BudgetConfig.leap,
        *, min_psnr: bool = False,
    ) -> None:  # fmt: skip
        self.pipe, self.denoisers, self.prompts, self.seed, self.effort = pipe, denoisers, prompts, seed, effort
        self.call, self.leap = call, leap
        self.player = Player(pipe, denoisers)
        self.first = range(choosing(len(prompts), min_psnr))  # prompts that choose plans; the others judge
        self.chosen: dict[str, str] = {}
        self.takes: dict[int, Take] = {}
        self.frames: dict[int, Any] = {}
        self.state: dict[str, Any] = {"deciding": {}, "seconds": {}, "real": {}}
        models, scheduler = [fingerprint(d) for d in denoisers.values()], pipe.scheduler
        solver = [type(scheduler).__name__, sorted((k, repr(v)) for k, v in settings(scheduler).items())]
        about = [
            models,
            solver,
            prompts,
            seed,
            repr(effort),
            leap,
            min_psnr,
            sorted((k, identity(v)) for k, v in call.items()),
        ]
        if checkpoint is not None:  # measurements on one model must not be continued on another
            about += [weights_digest(denoisers), str(getattr(pipe, "device", None))]
        self.checkpoint = Checkpoint(checkpoint, hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16])

    # -- runs ------------------------------------------------------------------------------------------------------

    def arguments(self, index: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for one prompt."""
        arguments = {"output_type": "np", **self.call, "generator": torch.Generator().manual_seed(self.seed + index)}
        if self.prompts[index] is not None:
            arguments["prompt"] = self.prompts[index]
        return arguments

    def profile(self, config: BudgetConfig, show: Callable[[str, int, int], None]) -> Profile:
        """Make all runs, and return the profile; see :func:`unicp.tune`."""
        with own_bar_hidden(self.pipe):
            self.state = self.checkpoint.load() or self.state
            for index in range(len(self.prompts)):
                self._trajectory(index, show)
            book = self._book(self._found(show), config, show)
        try:
            chosen = book.choose(config)
            if config.min_psnr is not None and chosen.plan.cost == 1:
                most = max((p.safe_psnr for p in book.plans if p.plan.cost < 1), default=0.0)
                raise UnicpError(
                    f"min_psnr={config.min_psnr:g}: only computing every step reaches it; the best plan that skips "
                    f"some reached {most:.1f} dB"
                )
        except UnicpError as error:
            warnings.warn(f"the profile is made, but {error}", UnicpWarning, stacklevel=3)
        judged = len(self._judged())
        if config.min_psnr is not None and judged < min(MIN_PROMPTS_FOR_BOUND, len(self.prompts)):
            warnings.warn(
                f"plans were chosen on {len(self.first)} of the {len(self.prompts)} prompts, so that {judged} judge "
                f"them; {2 * MIN_PROMPTS_FOR_BOUND} prompts say with 80% confidence what four of five reach",
                UnicpWarning,
                stacklevel=3,
            )
        written = self._written(config, book)
        self.checkpoint.remove()
        return written

    def _trajectory(self, index: int, show: Callable[[str, int, int], None]) -> None:
        """The unaccelerated run of a prompt."""
        name, first = str(index), index == 0
        if name in self.state["deciding"]:
            return
        what = f"prompt {index + 1} of {len(self.prompts)}, as it is"
        take = self.player.run(self.arguments(index), record=first, on_step=lambda s, n: show(what, s, n))
        if take.given != len(take.sigmas) - 1 or any(a <= b for a, b in pairwise(take.sigmas[:-1])):
            raise UnicpError(
                f"{type(self.pipe.scheduler).__name__} does not take one step for each noise level; tune needs a "
                "scheduler that does"
            )
        run, whole = take.given, len(getattr(self.pipe.scheduler, "timesteps", range(take.given)))
        if whole > run:
            raise UnicpError(
                f"only {run} of {whole} steps were run: the video begins in the middle (strength), where plans do not "
                "belong to the steps that are computed; tune with strength=1, other runs take over its plans"
            )
        if run < MIN_STEPS:
            raise UnicpError(f"of {run} steps there is nothing to plan; give num_inference_steps, {MIN_STEPS} or more")
        self._keep_frames(index, take)
        self.state["sigmas"] = take.sigmas
        self.state["deciding"][name] = gram(np.stack([t.double().numpy().ravel() for t in take.deciding])).tolist()
        self.state["seconds"][name] = take.seconds
        if first:
            self.state["idle"] = self._idle(index, take).seconds
            self.player.calls.clear()
        self.checkpoint.save(self.state)

    def _idle(self, index: int, take: Take) -> Take:
        """The same run with recorded outputs, in which no denoiser runs.

        Raises:
            UnicpError: the result differs, because the scheduler draws noise.
        """
        arguments = self.arguments(index)

        def other_noise(step: int, count: int) -> None:
            if step == 1:  # the noise that the video begins with is drawn by now
                arguments["generator"].manual_seed(self.seed + index + 1)

        idle = self.player.run(arguments, replay=True, on_step=other_noise)
        if float((idle.latents - take.latents).norm()) > 1e-4 * float(take.latents.norm()):
            raise UnicpError(
                f"two runs with the same model outputs differ: the scheduler, a {type(self.pipe.scheduler).__name__}, "
                "draws noise; tune needs a deterministic one (with eta, give eta=0)"
            )
        return idle

    def _keep_frames(self, index: int, take: Take) -> None:
        self.takes[index] = Take(latents=take.latents)
        self.frames[index] = _frames(take.result)

    def _default_plans(self, count: int, show: Callable[[str, int, int], None]) -> dict[int, StepPlan]:
        """The default plan at every cost in steps, for what this solver can do: one accelerated run shows that."""
        config = BudgetConfig(target_speedup=2.0, leap=self.leap)
        if "step" not in self.state:
            with accelerate(self.pipe, config) as session:

                def look(done: int, of: int) -> None:
                    if done == 1:
                        step = next(each.clock.step for each in session._hooked if each.clock.step is not None)
                        self.state["step"] = asdict(step)
                    show("the default plan", done, of)

                Player(self.pipe, {}).run(self.arguments(0), on_step=look)
            self.checkpoint.save(self.state)
        step, policy = Step(**self.state["step"]), BudgetPolicy(config)
        return {n: replace(policy.default_plan(step, n), default=True) for n in range(MIN_STEPS - 1, count)}

    def _real(
        self, plan: StepPlan, index: int, show: Callable[[int, int], None]
    ) -> tuple[float, float | None, dict[int, float]]:
        """Relative error of the final latents under a plan, PSNR of the video in dB, and errors of its forecasts."""
        fills = [[s.after, s.order, s.damping] for s in plan.segments]
        key = json.dumps([plan.compute, plan.places, fills, index])
        if key not in self.state["real"]:
            if index not in self.takes:
                self._keep_frames(index, self.player.run(self.arguments(index), on_step=show))
            take = self._run_under(plan, index, show)
            reference = self.takes[index].latents
            error = float((take.latents - reference).norm() / reference.norm())
            made, wanted = _frames(take.result), self.frames[index]
            quality = metrics.psnr(made, wanted) if made is not None and wanted is not None else None
            self.state["real"][key] = [error, quality, take.forecasts]
            self.checkpoint.save(self.state)
        error, quality, forecasts = self.state["real"][key]
        return error, quality, {int(step): value for step, value in forecasts.items()}  # keys in a checkpoint are text

    def _run_under(self, plan: StepPlan, index: int, show: Callable[[int, int], None]) -> Take:
        """Run a prompt under a plan."""
        config = BudgetConfig(target_speedup=1.0, override_reserve=0.0, leap=self.leap)
        with accelerate(self.pipe, config) as session:
            for each in session._hooked:
                each.parts.book = PlanBook(
                    sigmas=tuple(self.state["sigmas"][:-1]), plans=(Priced(plan=plan, speedup=1.0),)
                )
            take = Player(self.pipe, {}).run(self.arguments(index), on_step=show)
            steps = session.report().steps
        take.forecasts = {step.index: step.metric for step in steps if step.metric is not None}
        return take

    # -- decisions -------------------------------------------------------------------------------------------------

    def _found(self, show: Callable[[str, int, int], None]) -> dict[int, StepPlan]:
        """Plans by their cost in steps, at each cost of the kind that did best on the prompts that choose."""
        count = self._steps
        known = {DEFAULT_KIND: self._default_plans(count, show)}
        known |= {shape.name: plans for shape in self.effort.shapes if (plans := shape.plans(count))}
        best: dict[float, list[str]] = {}
        for speed in CHOICE_SPEEDUPS:
            offered = {name: nearest(plans, count / speed) for name, plans in known.items()}
            dearest = max(1 / speed + 0.5 / count, min(plan.cost for plan in offered.values()))
            offered = _distinct({name: plan for name, plan in offered.items() if plan.cost <= dearest})
            order = self._ranked(offered, f"{speed:g}x", show)
            best[count / speed] = [*order, *(name for name in known if name not in order)]
            self.chosen[f"{speed:g}x"] = order[0]
        result: dict[int, StepPlan] = {}
        for number in range(count):
            order = best[min(best, key=lambda computed: abs(computed - number))]
            kind = next((known[name] for name in order if number in known[name]), None)
            if kind is not None:
                result[number] = kind[number]
        return result

    def _ranked(self, offered: dict[str, StepPlan], at: str, show: Callable[[str, int, int], None]) -> list[str]:
        """Those of these plans that were run on all prompts that choose, best first.

        At each prompt the worse half drops out, but for the default plan.
        """
        scores: dict[str, list[float]] = {name: [] for name in offered}
        for index, kinds in zip(self.first, remaining(len(offered), len(self.first)), strict=True):
            if len(scores) > kinds:
                others = sorted(scores.keys() - {DEFAULT_KIND}, key=lambda name: (np.mean(scores[name]), name))
                keep = {DEFAULT_KIND, *others[: kinds - (DEFAULT_KIND in scores)]}
                scores = {name: losses for name, losses in scores.items() if name in keep}
            for number, (name, losses) in enumerate(scores.items()):
                what = f"{at}, prompt {index + 1}, plan {number + 1} of {len(scores)}"
                error, quality, _ = self._real(offered[name], index, functools.partial(show, what))
                # Videos are compared if there are any: not every error of latents can be seen in them.
                losses.append(float(np.log(max(error, 1e-9))) if quality is None else -min(quality, MAX_PSNR_DB))
        return ranked(scores)

    @property
    def _steps(self) -> int:
        """Number of denoising steps."""
        return len(self.state["sigmas"]) - 1

    def _book(
        self, found: dict[int, StepPlan], config: BudgetConfig, show: Callable[[str, int, int], None]
    ) -> PlanBook:
        found[self._steps] = computing(self._steps, range(self._steps))

        def run(plan: StepPlan, what: str) -> PlanResult:
            runs = [self._real(plan, i, lambda s, n: show(what, s, n)) for i in self._judged()]
            psnr = tuple([quality for _, quality, _ in runs if quality is not None])
            return PlanResult(plan=plan, psnr=psnr, forecasts=tuple(seen for _, _, seen in runs))

        return book(
            found,
            run,
            self.effort.speeds,
            config,
            overhead=self._overhead(),
            deciding=np.array(list(self.state["deciding"].values())),
            sigmas=self.state["sigmas"],
        )

    def _judged(self) -> range:
        """Prompts that no plan was chosen on: where the default plan is kept everywhere, all are."""
        count = len(self.prompts)
        fitted = len(self.first) < count and set(self.chosen.values()) != {DEFAULT_KIND}
        return range(len(self.first) if fitted else 0, count)

    def _overhead(self) -> float:
        """Share of a run's time that no skipped step saves."""
        whole = float(np.median(list(self.state["seconds"].values())))
        return float(np.clip(self.state["idle"] / whole, 0.0, 0.9))

    # -- files -----------------------------------------------------------------------------------------------------

    def _written(self, config: BudgetConfig, book: PlanBook) -> Profile:
        import diffusers

        from .. import __version__

        about: dict[str, Mapping[str, Any]] = {
            name: {"class": type(d).__name__, "fingerprint": fingerprint(d), "sigmas": list(book.sigmas)}
            for name, d in self.denoisers.items()
        }
        metadata = {
            "versions": {"unicp": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "steps": len(book.sigmas),
            "prompts": len(self.prompts),
            "prompts_hash": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16],
            "seed": self.seed,
            "call": {name: v for name, v in self.call.items() if isinstance(v, (int, float, str, bool))},
            "denoisers": about,
            "chosen": self.chosen,
            "budget": book.to_dict(),
        }
        return Profile(config=config, metadata=metadata)


def _distinct(plans: dict[str, StepPlan]) -> dict[str, StepPlan]:
    """Without those that do the same as an earlier one."""
    found: dict[Any, str] = {}
    for name, plan in plans.items():
        found.setdefault((plan.compute, plan.segments, plan.places), name)
    return {name: plans[name] for name in found.values()}


def _frames(result: Any) -> Any:
    """The video a pipeline returned, (F, H, W, 3) in [0, 1], or ``None`` where it returned latents."""
    frames = getattr(result, "frames", None)
    if not isinstance(frames, np.ndarray) or frames.ndim != 5:
        return None
    return torch.from_numpy(frames[0])
