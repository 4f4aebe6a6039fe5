"""A guider for modular pipelines of diffusers: it wraps the user's own, and leaves out calls of the denoiser.

Modular pipelines ask a guider which inputs to run the denoiser on, and give it the outputs. This one asks for fewer,
and puts what stands in for the others beside those that ran. No hook, no patch: what is compiled stays whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from diffusers.guiders import BaseGuidance

from ..engine.clock import Clock, Tick, takeover
from ..engine.report import SessionReport
from ..engine.run import Parts, Run
from ..engine.solver.leap import Leaper
from ..engine.solver.timesteps import keep_on_host
from ..engine.sources import Sources
from ..errors import UnicpError
from ..policies.base import Decision
from ..policies.config import make_policy
from ..profiles import read, resolve_config
from ..tensors import private
from .diffusers import hooks
from .diffusers.denoiser import STRAY_CALLS_NOTE, sound
from .diffusers.refusals import check_denoiser

DENOISERS = {"guider": "transformer", "guider_2": "transformer_2"}
"""Guiders of a pipeline, and the denoiser that each of them guides."""


class FillGuider(BaseGuidance):
    """The user's guider, asked for at every step; the denoiser runs at those that a config computes.

    ```python
    pipe.update_components(guider=FillGuider(pipe.guider, unicp.BudgetConfig(target_speedup=2), pipe))
    video = pipe(prompt="a cat on a surfboard", output="videos")
    print(pipe.guider.report())
    pipe.update_components(guider=pipe.guider.guider)  # as it was
    ```

    What is kept and forecast are the denoiser's outputs, one for each of the guider's conditions; the guider then makes
    of them what it always does. Everything else about it is the user's guider's: attributes, options, what is saved.

    Args:
        guider: the user's own.
        config: a config that fills whole outputs, as for :func:`unicp.accelerate`.
        pipe: its pipeline. Its scheduler tells noise levels and what the solver makes of an output, and takes longer
            steps where these are worth it. Without it noise levels are taken from the timesteps, outputs are not
            corrected, and the solver takes every step.

    Raises:
        UnicpError: it is no guider, or the method looks into the blocks of a denoiser.
    """

    def __init__(self, guider: BaseGuidance, config: Any, pipe: Any = None) -> None:
        guider = guider.guider if isinstance(guider, FillGuider) else guider
        if not isinstance(guider, BaseGuidance):
            raise UnicpError(
                f"FillGuider wraps a guider of diffusers, got {type(guider).__name__}; a pipeline without one (Flux) "
                "takes unicp.accelerate(pipe, config)"
            )
        if hasattr(guider, "active_predictions"):
            raise UnicpError(
                "LTX-2 unites the inputs of two guiders, so that neither can leave any out; use unicp.accelerate(pipe, "
                "config), which takes modular pipelines too"
            )
        self.__dict__.update(guider=guider, filling=_Filling(config, pipe))

    def __getattr__(self, name: str) -> Any:
        if name in ("guider", "filling"):  # not made yet: a copy in the making
            raise AttributeError(name)
        return getattr(self.guider, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.guider, name, value)

    def report(self) -> SessionReport:
        """What was done for the last video; for the one in progress, or broken off, so far.

        Raises:
            UnicpError: no video was begun yet.
        """
        if self.filling.run is None:
            raise UnicpError("there is no report yet: generate a video first")
        return self.filling.run.report()

    def new(self, **kwargs: Any) -> Any:
        return self.guider.new(**kwargs)

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        self.guider.set_state(step=step, num_inference_steps=num_inference_steps, timestep=timestep)
        self.filling.stand(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Any) -> Any:
        return self._wanted(self.guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> Any:
        return self._wanted(self.guider.prepare_inputs_from_block_state(data, input_fields))

    def _wanted(self, batches: list[Any]) -> list[Any]:
        """Those of a step's inputs that the denoiser is to be run on."""
        by_name = {private.condition_of(self.guider, batch): batch for batch in batches}
        return [by_name[name] for name in self.filling.plan({name: vars(batch) for name, batch in by_name.items()})]

    def prepare_models(self, denoiser: Any) -> None:
        place = self.filling.next(denoiser)
        if place is not None:
            private.count_prepared(self.guider, place)
        self.guider.prepare_models(denoiser)

    def cleanup_models(self, denoiser: Any) -> None:
        self.guider.cleanup_models(denoiser)

    def forward(self, **outputs: Any) -> Any:
        return self.guider.forward(**self.filling.fill(outputs))

    @property
    def is_conditional(self) -> bool:
        return bool(self.guider.is_conditional)

    @property
    def num_conditions(self) -> int:
        """Of the step in progress those that the denoiser runs on; between steps, and before, the guider's own."""
        wanted = self.filling.wanted
        return int(self.guider.num_conditions) if wanted is None else len(wanted)


class _Filling:
    """The video that is under way with one guider.

    Attributes:
        run: it, or the last one.
        wanted: conditions that the denoiser is to be run on at the step in progress; ``None`` between steps.
    """

    def __init__(self, config: Any, pipe: Any) -> None:
        self.config = read(resolve_config(config))
        self.needs = make_policy(self.config).needs()
        if self.needs.inside:
            raise UnicpError(
                f"{self.config.method} looks into the blocks of a denoiser, and a guider sees only its outputs; use "
                "unicp.accelerate(pipe, config), which takes modular pipelines too, or a BudgetConfig or ScheduleConfig"
            )
        if getattr(self.config, "profile", None) is not None and pipe is None:
            raise UnicpError("to play a profile, FillGuider has to know the model: give it the pipeline, pipe=pipe")
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self.clock = Clock(pipe, weigh=self.needs.weights, forecasts=self.needs.order > 0)
        self.leaper = Leaper(self.clock.scheduler, self.needs.leap)
        keep_on_host(self.clock.scheduler(), self)
        self.run: Run | None = None
        self.wanted: list[str] | None = None
        self._said: Any = None  # where the pipeline says that it is
        self._planned: dict[str, Decision] = {}
        self._tick: Tick | None = None
        self._sources = Sources(None, "", (), lambda note: None)  # of this run
        self._ran = 0  # conditions of this step
        self._unseen = True  # the denoiser of this run
        self._followed = False  # the run in progress is of the pipeline's scheduler

    def stand(self, step: int, count: int, timestep: Any) -> None:
        """The pipeline is at a step."""
        self._said = SimpleNamespace(name=None, step_index=step, num_inference_steps=count, sigma=None)
        self._said.timestep, self.wanted = timestep, None

    def plan(self, inputs: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Decides on a step's conditions, given by name, each with its inputs. Returns those to be computed."""
        names = list(inputs)
        self._planned, self.wanted, self._ran, self._tick = {}, names, 0, None
        if self._said is None or not names:
            return names
        self._said.name = names[0]
        self.clock.beside = [each.clock for each in self._siblings().values()]
        tick = self.clock.tick(self._said, {"timestep": self._said.timestep})
        if tick.stray:
            if self.run is not None:
                self.run.remark(STRAY_CALLS_NOTE)
            return names
        if tick.new_generation:
            tick = self._begin(tick)
        self._tick, run = tick, self.run
        assert run is not None
        leaper = self.leaper if self._followed else None
        for name, given in inputs.items():
            decided, called = run.decide(tick.step, name), replace(tick, branch=name)
            self._planned[name] = sound(run, called, decided, self._sources, given, leaper)
            if decided.runs and self._followed:
                self.leaper.go(tick.step.index, run.decision)
        self.wanted = [name for name, decision in self._planned.items() if decision.runs]
        return self.wanted

    def _begin(self, tick: Tick) -> Tick:
        """A video begins. Returns its step, told what the solver can do."""
        siblings, pipe = self._siblings(), self._pipe()
        left: dict[str, Any] = {}
        for sibling in siblings.values():
            self.leaper = sibling.leaper  # they have one solver
            if sibling.run is not None:
                left |= sibling.run.rest()
        if self.run is not None:
            self.run.close()
        keep_on_host(self.clock.scheduler(), self)  # it may be another one by now
        own = [name for name in DENOISERS if self._of(pipe, name) is self]
        name = DENOISERS[own[0]] if own else "transformer"
        parts = Parts()
        profile = getattr(self.config, "profile", None)
        if profile is not None:
            profile.opened(getattr(pipe, name, None), name, pipe)
            parts.book = profile.book(self.config)
        self.run = Run(self.config.shared(1 + len(siblings)), name=name, parts=parts)
        self._sources, self._unseen = Sources(None, "", (), self.run.remark), True
        self.leaper.allowed = not siblings or takeover(pipe) is not None
        self._followed = self.clock.follows_scheduler
        if self._followed:
            self.leaper.begin(tick.step.index)
            if self.leaper.active and self.leaper.over(tick.step.index):
                self.run.borrow(left)
        if not self._followed or not self.leaper.active:
            return tick
        # Timesteps go from the pipeline to the denoiser directly: it is called at those of the run.
        return replace(tick, step=self.clock.allow_leaps(**self.leaper.worth))

    @staticmethod
    def _of(pipe: Any, name: str) -> _Filling | None:
        return vars(guider)["filling"] if isinstance(guider := getattr(pipe, name, None), FillGuider) else None

    def _siblings(self) -> dict[str, _Filling]:
        """What fills for other denoisers of the pipeline (Wan 2.2)."""
        found = {name: self._of(self._pipe(), name) for name in DENOISERS}
        return {name: each for name, each in found.items() if each is not None and each is not self}

    def next(self, denoiser: Any) -> int | None:
        """The denoiser is about to run. Which of the guider's conditions this is, if it may not be the next one."""
        if self.run is not None and self._unseen:
            check_denoiser(denoiser, self._pipe(), self.config.method, self.needs, None)
            if hooks.find(denoiser, hooks.DENOISER_HOOK) is not None:
                raise UnicpError(
                    "unicp.accelerate acts on this denoiser already; unicp.restore(pipe), or drop the guider"
                )
            self._unseen = False
            self._sources.found(denoiser)
        self._ran += 1
        if not self.wanted or not self._planned or self._ran > len(self.wanted):
            return None
        return list(self._planned).index(self.wanted[self._ran - 1])

    def fill(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs of all of the guider's conditions, from those that were computed."""
        tick, run, self.wanted = self._tick, self.run, None
        if tick is None or run is None or not self._planned:
            return outputs
        planned, self._planned = self._planned, {}
        for name in planned if tick.step.is_last(1) else ():
            self._sources.forget(name)
        return {
            name: run.act(tick.step, name, decision, lambda name=name: outputs[name])  # type: ignore[misc]
            for name, decision in planned.items()
        }
