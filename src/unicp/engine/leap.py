"""Longer solver steps: from one computed step straight to the next.

A multistep solver can take fewer, longer steps; that is what "fewer steps" does for a whole run. Here a policy asks for
it between two steps of a run that goes on as planned elsewhere. The solver is shown the noise levels of the steps it
really takes, and its own code does the rest; at the steps in between neither the denoiser nor the solver acts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .solver import InPlace

if TYPE_CHECKING:
    from ..policies import Plan, Step
    from .executor import Executor

SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
"""Their steps look at nothing but noise levels, the step's number and what they were given. Solvers of first order gain
nothing: a forecast is better than one long step of Euler's."""


def leaps(scheduler: Any) -> bool:
    """Whether a scheduler, its timesteps set, can take longer steps that are worth it."""
    if type(scheduler).__name__ not in SOLVERS:
        return False
    config = scheduler.config
    noisy = "sde" in str(config.get("algorithm_type", ""))
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    return config.get("solver_order", 1) > 1 and not noisy and len(sigmas) == len(timesteps) + 1


class Leaper:
    """Stands before a scheduler's ``step``, on the instance, for the length of one run.

    Where a run goes on after ``restore``, it stays until the last step if there was a leap: what was leapt over stays
    so, and the solver has to see its path.

    Args:
        executor: of the denoiser whose policy says where to go.

    Attributes:
        alone: the pipeline has no other denoiser, whose turn might begin within a longer step.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.alone = False
        self._scheduler: Any = None
        self._timesteps: Any = None  # of the run; set_timesteps makes new ones for every video
        self._forget()

    def _forget(self) -> None:
        self._kind: Any = tuple  # of what ``step`` returns
        self._until = 0
        self._taken: list[int] = []
        self._leapt = False

    def begin(self) -> None:
        """A run begins; its timesteps are set. Schedulers that cannot leap, or are under way, are left alone."""
        scheduler = self._executor.clock.scheduler()
        if scheduler is not None and scheduler is self._scheduler and scheduler.timesteps is self._timesteps:
            return  # it is still that run
        self._leave()
        able = self.alone and self._executor.needs.leap and leaps(scheduler)
        if not able or scheduler.step_index is not None:
            return
        self._scheduler, self._timesteps = scheduler, scheduler.timesteps
        self._before = vars(scheduler).get("step")  # somebody else's, on the instance too
        self._own = scheduler.step
        scheduler.step = self._placed = InPlace(scheduler, self.step)
        self._signature = self._placed.__signature__

    def end(self) -> None:
        """The run is over, or goes on without us."""
        if not self._leapt:
            self._leave()

    def _leave(self) -> None:
        """The scheduler is as it was."""
        scheduler, self._scheduler = self._scheduler, None
        self._forget()
        if scheduler is not None and vars(scheduler).get("step") is self._placed:
            del scheduler.step
            if self._before is not None:
                scheduler.step = self._before

    def weight(self, step: Step, plan: Plan) -> float | None:
        """The solver's weight of a forecast, if a later step is to make good what it is off by.

        Where the solver may take a longer step from a step by halves, the weights of its short steps say nothing.
        """
        return None if plan.action == "conditional" and self._scheduler is not None else step.weight

    def over(self, index: int) -> bool:
        """Whether the solver has gone beyond this step already."""
        return index < self._until

    def step(self, *args: Any, **kwargs: Any) -> Any:
        scheduler = self._scheduler
        if scheduler is None or scheduler.timesteps is not self._timesteps:
            self._leave()  # another run, of which we know nothing
            return self._own(*args, **kwargs)
        index = scheduler.step_index
        if index is not None and self.over(index):
            scheduler._step_index = index + 1
            sample = self._signature.bind(*args, **kwargs).arguments["sample"]
            return (sample,) if self._kind is tuple else self._kind(prev_sample=sample)
        if index is None:  # the first one; the solver has yet to find where it is
            result = self._own(*args, **kwargs)
            self._taken = [scheduler.step_index - 1]
        else:
            self._until = self._ask(index)
            self._leapt |= self._until > index + 1
            self._taken.append(index)
            result = self._shown(self._until, args, kwargs)
            scheduler._step_index = index + 1
        self._kind = type(result)
        if scheduler.step_index >= len(self._timesteps):
            self._leave()
        return result

    def _ask(self, index: int) -> int:
        """The step to which the solver should go from this one."""
        self._executor.settle()  # the policy may doubt its plan by what this step measured
        step, policy = self._executor.clock.step, self._executor.policies.get("")
        if policy is None or step is None or step.index != index:
            return index + 1
        return policy.leap(step)

    def _shown(self, until: int, args: Any, kwargs: Any) -> Any:
        """The solver's own step, with nothing before it but the steps it took, and ``until`` next."""
        scheduler = self._scheduler
        known = scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps
        path = [*self._taken, *range(until, len(known[1]))]
        try:
            if len(path) < len(known[1]) - self._taken[0]:
                scheduler.sigmas, scheduler.timesteps = known[0][[*path, len(known[1])]], known[1][path]
                scheduler.num_inference_steps, scheduler._step_index = len(path), len(self._taken) - 1
            return self._own(*args, **kwargs)
        finally:
            scheduler.sigmas, scheduler.timesteps, scheduler.num_inference_steps = known
            scheduler._step_index = self._taken[-1]
