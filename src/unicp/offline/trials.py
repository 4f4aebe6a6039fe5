"""One tuning: the runs that it makes, and the decisions that follow from them. It is ours, not a paper's."""

from __future__ import annotations

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
from ..policies.base import Step, unconditional
from ..policies.budget import BudgetConfig, BudgetPolicy, PlanBook, Priced
from ..policies.config import Config
from ..policies.plans.step_plan import StepPlan, alternating, growing, nearest
from ..policies.unicp import UniCPConfig
from ..profiles import Profile, content_of
from ..profiles.identity import fingerprint, identity, settings, weights_digest
from ..tensors import metrics
from ..tensors.extrapolation import weights
from .candidates import CHOICE_SPEEDUPS, DEFAULT_KIND, Effort, kinds, ranked
from .expectation import MAX_PSNR_DB, PlanResult, book
from .replay import Player, Take
from .runs import own_bar_hidden
from .search import Trajectories, errors, gain_curve, gram, power_mean

MIN_PROMPTS_FOR_BOUND = 8
"""Prompts that it takes to know with 80% confidence what four of five reach (:attr:`Priced.safe_psnr`)."""

MIN_STEPS = 4
"""Fewest steps of a run for which plans can be made: the default plan computes at least three."""


class Tuner:
    """One tuning and its results so far."""

    def __init__(
        self, pipe: Any, denoisers: dict[str, Any], prompts: list[str | None], call: dict[str, Any], seed: int,
        effort: Effort, inside: UniCPConfig | None, checkpoint: str | os.PathLike[str] | None,
        leap: float = BudgetConfig.leap,
    ) -> None:  # fmt: skip
        self.pipe, self.denoisers, self.prompts, self.seed, self.effort = pipe, denoisers, prompts, seed, effort
        self.call, self.inside, self.leap = call, inside, leap
        self.player = Player(pipe, denoisers)
        self.first = range((len(prompts) + 1) // 2)  # prompts that plans may be fitted to; the others judge
        self.chosen: dict[str, str] = {}
        self.takes: dict[int, Take] = {}
        self.frames: dict[int, Any] = {}
        self.state: dict[str, Any] = {"grams": {}, "deciding": {}, "gains": {}, "seconds": {}, "real": {}}
        models, scheduler = [fingerprint(d) for d in denoisers.values()], pipe.scheduler
        solver = [type(scheduler).__name__, sorted((k, repr(v)) for k, v in settings(scheduler).items())]
        about = [models, solver, prompts, seed, repr(effort), leap, sorted((k, identity(v)) for k, v in call.items())]
        if inside is not None:
            about.append(content_of(inside))
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
            trajectories = self._trajectories()
            book = self._book(trajectories, self._found(trajectories, show), config, show)
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
                f"plans were made to fit {len(self.first)} of the {len(self.prompts)} prompts, so that {judged} judge "
                f"them; {2 * MIN_PROMPTS_FOR_BOUND} prompts say with 80% confidence what four of five reach",
                UnicpWarning,
                stacklevel=3,
            )
        written = self._written(config, book)
        self.checkpoint.remove()
        return written

    def _trajectory(self, index: int, show: Callable[[str, int, int], None]) -> None:
        """The unaccelerated run of a prompt, and, for the first ones, runs with injected errors."""
        name = str(index)
        what = f"prompt {index + 1} of {len(self.prompts)}"
        gains = index < self.effort.gain_prompts and index in self.first
        if name in self.state["grams"] and (not gains or name in self.state["gains"]):
            return
        take = self.player.run(
            self.arguments(index), record=gains, on_step=lambda s, n: show(f"{what}, as it is", s, n)
        )
        if len(take.given) != len(take.sigmas) - 1 or any(a <= b for a, b in pairwise(take.sigmas[:-1])):
            raise UnicpError(
                f"{type(self.pipe.scheduler).__name__} does not take one step for each noise level; tune needs a "
                "scheduler that does"
            )
        run, whole = len(take.given), len(getattr(self.pipe.scheduler, "timesteps", take.given))
        if whole > run:
            raise UnicpError(
                f"only {run} of {whole} steps were run: the video begins in the middle (strength), where plans do not "
                "belong to the steps that are computed; tune with strength=1, other runs take over its plans"
            )
        if run < MIN_STEPS:
            raise UnicpError(f"of {run} steps there is nothing to plan; give num_inference_steps, {MIN_STEPS} or more")
        self._keep_frames(index, take)
        outputs = np.stack([t.double().numpy().ravel() for t in take.given])
        apart = len(take.branches) == 2 and any(map(unconditional, take.branches))
        self.state["sigmas"], self.state["apart"] = take.sigmas, apart
        self.state["grams"][name] = gram(outputs).tolist()
        self.state["deciding"][name] = gram(np.stack([t.double().numpy().ravel() for t in take.deciding])).tolist()
        if gains:
            self.state["weights"] = take.weights or np.diff(take.sigmas).tolist()
            self.state["seconds"][name] = [take.seconds, self._idle(index, take).seconds]
            self.state["gains"][name] = self._gains(index, take, show)
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

        idle = self.player.run(arguments, play_until=10**9, on_step=other_noise)
        if float((idle.latents - take.latents).norm()) > 1e-4 * float(take.latents.norm()):
            raise UnicpError(
                f"two runs with the same model outputs differ: the scheduler, a {type(self.pipe.scheduler).__name__}, "
                "draws noise; tune needs a deterministic one (with eta, give eta=0)"
            )
        return idle

    def _gains(self, index: int, take: Take, show: Callable[[str, int, int], None]) -> list[list[float]]:
        """Pairs (step, gain): how much larger an error at a step is at the end than the solver alone would make it."""
        sigmas, weight, count = take.sigmas, self.state["weights"], len(take.given)
        positions = np.unique(np.linspace(1, count - 1, self.effort.gain_positions).round().astype(int))
        found = []
        for number, position in enumerate(positions):
            nodes = [n for n in (position - 2, position - 4) if n >= 0] or [position - 1]
            factors = weights([sigmas[n] for n in nodes], sigmas[position])
            made = sum(f * take.given[n] for f, n in zip(factors, nodes, strict=True))
            wrong = made - take.given[position]

            def change(step: int, value: Any, at: int = int(position), wrong: Any = wrong) -> Any:
                return value + wrong.to(value.device, value.dtype) if step == at else value

            what = f"prompt {index + 1}, error {number + 1} of {len(positions)}"
            run = self.player.run(
                self.arguments(index),
                play_until=int(position) + 1,
                change=change,
                on_step=lambda s, n, what=what: show(what, s, n),  # type: ignore[misc]
            )
            size = abs(weight[position]) * float(wrong.norm())
            found.append([float(position), float((run.latents - take.latents).norm()) / max(size, 1e-12)])
        return found

    def _keep_frames(self, index: int, take: Take) -> None:
        self.takes[index] = Take(latents=take.latents)
        self.frames[index] = _frames(take.result)

    def _trajectories(self) -> Trajectories:
        """The unaccelerated runs of the prompts that plans may be fitted to."""
        grams = np.array([self.state["grams"][str(i)] for i in self.first])
        return Trajectories(
            sigmas=np.array(self.state["sigmas"]),
            grams=grams,
            gains=gain_curve(list(self.state["gains"].values()), grams.shape[1]),
            weights=np.array(self.state["weights"]),
        )

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
        key = json.dumps([plan.compute, plan.conditional, plan.inside, fills, index])
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

    def _run_under(
        self, plan: StepPlan, index: int, show: Callable[[int, int], None], leap: float | None = None
    ) -> Take:
        """Run a prompt under a plan."""
        leap = self.leap if leap is None else leap
        config: Config = BudgetConfig(target_speedup=1.0, override_reserve=0.0, leap=leap)
        if plan.inside and self.inside is not None:
            config = self.inside.replace(stack=config)
        with accelerate(self.pipe, config) as session:
            for each in session._hooked:
                each.parts.book = PlanBook(
                    sigmas=tuple(self.state["sigmas"][:-1]), plans=(Priced(plan=plan, speedup=1.0),)
                )
            take = Player(self.pipe, {}).run(self.arguments(index), on_step=show)
            steps = session.report().steps
        for step in steps:
            take.operations[step.index] = take.operations.get(step.index, 0) + step.operations
        take.forecasts = {step.index: step.metric for step in steps if step.metric is not None}
        return take

    # -- decisions -------------------------------------------------------------------------------------------------

    def _found(self, trajectories: Trajectories, show: Callable[[str, int, int], None]) -> dict[int, StepPlan]:
        """Plans by their cost in steps, at each cost of the kind that did best on the first half of the prompts."""
        count = trajectories.steps
        known = kinds(
            trajectories,
            self.effort,
            self._default_plans(count, show),
            apart=self.state["apart"],
            inside_cost=self._inside_cost(count, show) if self.inside is not None else 1.0,
        )
        best: dict[float, list[str]] = {}
        for speed in CHOICE_SPEEDUPS:
            offered = {name: nearest(found, count / speed) for name, found in known.items()}
            dearest = max(1 / speed + 0.5 / count, min(plan.cost for plan in offered.values()))
            offered = {name: plan for name, plan in offered.items() if plan.cost <= dearest}
            scores: dict[str, list[float]] = {}
            for number, (name, plan) in enumerate(offered.items()):
                what = f"{speed:g}x, plan {number + 1} of {len(offered)}"
                runs = [self._real(plan, i, lambda s, n: show(what, s, n)) for i in self.first]  # noqa: B023
                # Videos are compared if there are any: not every error of latents can be seen in them.
                scores[name] = [
                    float(np.log(max(error, 1e-9))) if quality is None else -min(quality, MAX_PSNR_DB)
                    for error, quality, _ in runs
                ]
            best[count / speed] = ranked(scores)
            self.chosen[f"{speed:g}x"] = best[count / speed][0]
        result: dict[int, StepPlan] = {}
        for number in range(count):
            order = best[min(best, key=lambda computed: abs(computed - number))]
            kind = next((known[name] for name in order if number in known[name]), None)
            if kind is not None:
                result[number] = kind[number]
        return result

    def _book(
        self,
        trajectories: Trajectories,
        found: dict[int, StepPlan],
        config: BudgetConfig,
        show: Callable[[str, int, int], None],
    ) -> PlanBook:
        found[trajectories.steps] = growing(trajectories.steps, trajectories.steps, trajectories.steps, 0)
        found = {n: replace(plan, predicted=power_mean(errors(trajectories, plan), 0)) for n, plan in found.items()}

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
        """Prompts that no plan was fitted to."""
        count = len(self.prompts)
        fitted = count > 1 and set(self.chosen.values()) != {DEFAULT_KIND}
        return range(len(self.first) if fitted else 0, count)

    def _overhead(self) -> float:
        """Share of a run's time that no skipped step saves."""
        whole, idle = np.median(list(self.state["seconds"].values()), axis=0)
        return float(np.clip(idle / whole, 0.0, 0.9))

    def _inside_cost(self, count: int, show: Callable[[str, int, int], None]) -> float:
        """Operations of a step with UniCP inside, as a share of a whole one's."""
        plan = alternating(count, count // 2, 3, inside_cost=0.5)
        if not plan.inside:
            return 1.0
        if "inside" not in self.state:
            shares = []
            for index in range(len(self.state["seconds"])):
                spent = self._run_under(plan, index, lambda s, n: show("UniCP inside", s, n), leap=0.0).operations
                whole = float(np.median([spent[step] for step in set(plan.compute) - set(plan.inside)]))
                shares.append(float(np.median([spent[step] for step in plan.inside])) / max(whole, 1.0))
            self.state["inside"] = float(np.median(shares))
            self.checkpoint.save(self.state)
        return float(np.clip(self.state["inside"], 0.05, 1.0))

    # -- files -----------------------------------------------------------------------------------------------------

    def _written(self, config: BudgetConfig, book: PlanBook) -> Profile:
        import diffusers

        from .. import __version__

        about: dict[str, Mapping[str, Any]] = {
            name: {"class": type(d).__name__, "fingerprint": fingerprint(d), "sigmas": list(book.sigmas)}
            for name, d in self.denoisers.items()
        }
        more: dict[str, Any] = {}
        tensors: Mapping[str, Any] = {}
        if self.inside is not None:
            more["inside"] = self.inside.replace(profile=None).to_dict()
            if self.inside.profile is not None:
                profile = self.inside.profile
                calibrated = profile if isinstance(profile, Profile) else Profile.load(profile)
                tensors = calibrated.tensors
                about |= {name: {**calibrated.of(name).metadata, "steps": calibrated.of(name).steps} for name in about}
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
            "gains": {name: points for name, points in self.state["gains"].items()},
            "budget": book.to_dict(),
            **more,
        }
        return Profile(config=config, tensors=tensors, metadata=metadata)


def _frames(result: Any) -> Any:
    """The video a pipeline returned, (F, H, W, 3) in [0, 1], or ``None`` where it returned latents."""
    frames = getattr(result, "frames", None)
    if not isinstance(frames, np.ndarray) or frames.ndim != 5:
        return None
    return torch.from_numpy(frames[0])
