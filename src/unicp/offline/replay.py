"""Runs of a pipeline that are recorded, or replayed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.arguments import named, parameters
from ..engine.clock import Clock
from ..engine.fills.output import leading
from ..engine.solver.response import InPlace
from ..errors import UnicpError
from ..hosts.diffusers import hooks
from ..specs import find_spec
from ..tensors.host import accelerator
from ..tensors.private import pytree

REPLAY_HOOK = "unicp_replay"


@dataclass
class Take:
    """One run.

    Attributes:
        given: how many outputs the scheduler's ``step`` was given.
        deciding: output of the guidance branch that is called first, at each step, on the host.
        latents: latents after the last step.
        sigmas: noise level of each step, and that of the end of the run.
        result: what the pipeline returned.
        seconds: seconds of the denoising loop, from the first call of a denoiser that is watched.
        forecasts: error of the forecasts at the computed steps of an accelerated run, by step.
    """

    given: int = 0
    deciding: list[Any] = field(default_factory=list)
    latents: Any = None
    sigmas: list[float] = field(default_factory=list)
    result: Any = None
    seconds: float = 0.0
    forecasts: dict[int, float] = field(default_factory=dict)


class Player:
    """Records denoiser calls of one run and replays them in later ones.

    Args:
        pipe: the pipeline; its scheduler's ``step`` is replaced on the instance, for the length of a run.
        denoisers: its denoisers by name.
    """

    def __init__(self, pipe: Any, denoisers: dict[str, Any]) -> None:
        self.pipe, self.denoisers = pipe, denoisers
        self.calls: list[Any] = []

    def run(
        self,
        call: dict[str, Any],
        *,
        record: bool = False,
        replay: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Take:
        """Run the pipeline.

        Args:
            call: arguments of its call.
            record: keep every denoiser output, to replay it later.
            replay: denoisers do not run: the recorded outputs replace theirs.
            on_step: called with the number of steps done and the number of all steps.

        Raises:
            UnicpError: the pipeline never calls its scheduler's ``step``.
        """
        take = Take()
        if record:
            self.calls = []
        counter = iter(range(10**9))
        began: list[float] = []

        def called(hook: Any, clock: Clock, names: list[str], forward: Any, args: Any, kwargs: Any) -> Any:
            call = named(names, args, kwargs)
            if not began:
                began.append(_now(next(value for value in call.values() if isinstance(value, torch.Tensor))))
            place = next(counter)
            tick = clock.tick(hook.contexts.current, call)
            if replay:
                device = next(value for value in call.values() if isinstance(value, torch.Tensor)).device
                output = _moved(self.calls[place], device)
            else:
                output = forward(*args, **kwargs)
            if record:
                self.calls.append(_moved(output, "cpu"))
            if tick.new_step:
                take.sigmas.append(tick.step.sigma)
                take.deciding.append(leading(output).detach().float().cpu())
            return output

        with ExitStack() as stack:
            for denoiser in self.denoisers.values():
                hook = hooks.DenoiserHook(lambda *_: None, lambda: None, self)
                spec = find_spec(denoiser)
                hook.act = functools.partial(called, hook, Clock.of(self.pipe, spec), parameters(denoiser))
                hooks.install(denoiser, hook, REPLAY_HOOK)
                stack.callback(hooks.uninstall, denoiser, hook, REPLAY_HOOK)
            stack.enter_context(_watched(self.pipe.scheduler, take, began, on_step))
            take.result = self.pipe(**call)
        if not take.given:
            raise UnicpError(
                f"{type(self.pipe).__name__} steps copies of its scheduler: what its solver is given cannot be watched"
            )
        take.sigmas.append(0.0)
        return take


class _watched:
    """Watches the scheduler's ``step`` on the instance."""

    def __init__(self, scheduler: Any, take: Take, began: list[float], on_step: Any) -> None:
        self.scheduler, self.take, self.began, self.on_step = scheduler, take, began, on_step

    def __enter__(self) -> None:
        self.before = vars(self.scheduler).get("step")  # another replacement, on the instance too
        own = self.scheduler.step

        def step(model_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.take.given += 1
            result = own(model_output, *args, **kwargs)
            self.take.latents = leading(result).detach().float().cpu()  # which waits for the device
            if self.began:
                self.take.seconds = time.perf_counter() - self.began[0]
            if self.on_step is not None:
                self.on_step(self.take.given, len(self.scheduler.timesteps))
            return result

        self.scheduler.step = InPlace(self.scheduler, step)

    def __exit__(self, *_: object) -> None:
        del self.scheduler.step
        if self.before is not None:
            self.scheduler.step = self.before


def _now(tensor: Any) -> float:
    """Time in seconds, taken once everything that was queued on the tensor's device is done."""
    current = accelerator()
    if current is not None and tensor.device.type == current.type:
        torch.accelerator.synchronize(tensor.device)
    return time.perf_counter()


def _moved(output: Any, device: Any) -> Any:
    """An output of whatever type, with its tensors on a device."""
    return pytree.tree_map(lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x, output)
