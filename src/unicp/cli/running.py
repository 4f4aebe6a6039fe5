"""Makes one video with progress on the screen; the timing itself is in :mod:`unicp.bench.harness`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..bench.harness import Made, generate
from ..engine.report import StepRecord
from ..engine.solver.levels import noise_levels
from ..policies.config import Config
from .screen import steps

DONE = {"compute": "computed", "reuse": "reused", "forecast": "forecast", "leap": "leapt over", "partial": "partial"}
"""Words for what a step did, in the progress."""


def _sigma(pipe: Any, index: int, records: list[StepRecord]) -> float | None:
    if records:
        return records[-1].sigma
    sigmas = getattr(pipe.scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) <= index:
        return None
    return noise_levels(pipe.scheduler, [float(sigmas[index])])[0]


def _done(records: list[StepRecord]) -> str:
    """What the calls of one step did, in a few words; the guidance branches may differ."""
    actions = list(dict.fromkeys(record.action for record in records)) or ["compute"]
    return "+".join(DONE[action] for action in actions)


def make(pipe: Any, call: Mapping[str, Any], *, seed: int, config: Config | None, title: str) -> Made:
    """Generate one video, accelerated by ``config``, and show its steps.

    Raises:
        RuntimeError: the pipeline returned no video, or one that holds values that are not numbers.
    """
    from ..hosts.diffusers.session import accelerate

    with ExitStack() as stack:
        session = stack.enter_context(accelerate(pipe, config)) if config is not None else None
        shown = stack.enter_context(steps(title, call.get("num_inference_steps")))

        def show(running: Any, done: int, total: int) -> None:
            records = session.records if session is not None else []
            latest = [record for record in records if record.index == done - 1]
            what = "decoding" if done == total else _done(latest)
            shown.show(done, total, _sigma(running, done - 1, latest), what)

        made = generate(pipe, call, seed=seed, on_step=show)
    # Outside the progress bar, as the session may print a warning.
    return made if session is None else dataclasses.replace(made, report=session.report())
