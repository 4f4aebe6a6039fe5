"""``unicp.calibrate`` measures unaccelerated runs of a pipeline, and returns a profile."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..engine.report import readable_bytes
from ..engine.slicing.attention import rank_grid
from ..errors import UnicpError
from ..hosts.diffusers import hooks
from ..hosts.diffusers.components import find_denoisers
from ..hosts.diffusers.parallel import group_of
from ..policies.config import check_number
from ..policies.unicp import UniCPConfig, planned
from ..policies.unit_errors import UnitErrors
from ..profiles import Profile
from ..profiles.identity import fingerprint, identity, weights_digest
from ..profiles.measured import TABLES
from ..progress import progress_bar
from ..specs import ATTENTION_KINDS, ModelSpec, find_spec, known_specs
from .recorders import STACK, ErrorRecorder, MomentRecorder, Recorder, SlicingRecorder, Sums
from .runs import check_prompts, own_bar_hidden

PHASES = ("errors", "bases", "slicing")
"""What one run of the pipeline measures: changes from step to step; second moments; slicing errors."""
SLICING_STEPS = 6
"""Most steps of a run at which slicing errors are measured, for each unit."""


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | None,
    *,
    config: UniCPConfig | None = None,
    slicing_prompts: int = 2,
    tokens: int = 2048,
    host: bool = False,
    seed: int = 0,
    spec: ModelSpec | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[str, int, int], None] = True,
    **call: Any,
) -> Profile:
    """Measure an unaccelerated pipeline, for UniCP and for figures.

    The pipeline runs once for every prompt and, if slicing is to be measured, twice more for the first
    ``slicing_prompts`` of them. For each attention module and MLP, calibration measures how much its output changes
    over 1 to ``config.max_window`` steps (``E[m, t, k]``, sum of absolute differences over sum of absolute values), and
    how far the forecast from two neighbouring steps is off so many steps later (``F[m, t, k]``, with
    ``config.damping``); ``E`` of the residual of all blocks as well. It also measures AdaCache's metric and motion
    score. At the steps that the windows leave uncached, it measures second moments of queries, keys and values of each
    head, and how much slicing to each rank changes the output.

    Args:
        pipe: a diffusers pipeline, not accelerated.
        prompts: prompts of one run each, with noise of their own; ``None`` if ``call`` carries ``prompt_embeds``.
        config: the config that the profile will hold. Changes are measured up to its ``max_window``, its thresholds
            decide which steps are uncached, and ``pcas=False`` leaves slicing out.
        slicing_prompts: how many prompts are run again for slicing, at least 1.
        tokens: most rows of an output that are compared, evenly spaced, at least 1. Kept outputs take ``(max_window
            + 1) * tokens * channels`` values for each unit and guidance branch.
        host: keep these outputs in the host's memory.
        seed: the noise of prompt i is drawn on the CPU from ``seed + i``.
        spec: the structure of a model that is not built in.
        checkpoint: path of a file with the results so far, from which an interrupted calibration resumes; it is removed
            at the end.
        progress: whether to show a progress bar, or a function to call with what is done, the step and the number of
            steps.
        **call: arguments of the pipeline's call (``num_frames``, ``guidance_scale``, ...).

    Returns:
        The profile; ``save`` writes it.

    Raises:
        UnicpError: the pipeline is accelerated or its structure is not known, there are no prompts, or the checkpoint
            belongs to another calibration.
    """
    config = config or UniCPConfig()
    denoisers, given = find_denoisers(pipe)
    if given is None:
        raise UnicpError("calibrate runs a pipeline: pass the pipeline, not its transformer")
    check_prompts(prompts, call)
    check_number("slicing_prompts", slicing_prompts, low=1, whole=True)
    check_number("tokens", tokens, low=1, whole=True)
    specs: dict[str, ModelSpec] = {}
    for name, denoiser in denoisers.items():
        if hooks.find(denoiser, hooks.DENOISER_HOOK) is not None:
            raise UnicpError("the pipeline is accelerated; calibrate measures it as it is: unicp.restore(pipe) first")
        if group_of(denoiser) is not None:
            raise UnicpError("the pipeline is context-parallel; calibrate it in one process: profiles serve both")
        found = spec or find_spec(denoiser)
        if found is None or not any(described.units for described in found.block_lists):
            raise UnicpError(
                f"the attention modules of {type(denoiser).__name__} are not known; known: "
                f"{', '.join(sorted(known_specs()))}. Describe it with a ModelSpec whose block lists have units"
            )
        specs[name] = found
    texts: list[str | None] = [None] if prompts is None else [str(prompt) for prompt in prompts]
    job = _Job(pipe, denoisers, specs, config, texts, call, seed, tokens, host)
    slicing = config.pcas and config.delta_prune > 0
    runs = [("errors", i) for i in range(len(texts))]
    if slicing:
        runs += [(phase, i) for phase in PHASES[1:] for i in range(min(slicing_prompts, len(texts)))]
    which = job.identity(runs) if checkpoint is not None else ""
    state = _State.load(checkpoint, which) if checkpoint is not None else _State({}, [], {})
    with progress_bar(progress, "calibrating", job.what_is_kept()) as show:
        for number, (phase, index) in enumerate(runs):
            if [phase, index] not in state.done:
                what = f"run {number + 1} of {len(runs)}"
                job.run(phase, index, state, lambda step, count, what=what: show(what, step, count))  # type: ignore[misc]
                state.done.append([phase, index])
                if checkpoint is not None:
                    state.save(checkpoint, which)
    profile = job.profile(state)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return profile


class _State:
    """The measurements so far, and the runs that are done."""

    def __init__(self, tensors: Mapping[str, Any], done: list[list[Any]], facts: dict[str, Any]) -> None:
        self.sums = Sums(tensors)
        self.done = done
        self.facts = facts  # "sigmas" by denoiser, and the number of "steps"

    def save(self, path: str | os.PathLike[str], identity: str) -> None:
        metadata = {"identity": identity, "done": self.done, "facts": self.facts}
        Profile(config=UniCPConfig(), tensors=self.sums.tensors, metadata=metadata).save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], identity: str) -> _State:
        if not os.path.exists(path):
            return cls({}, [], {})
        saved = Profile.load(path)
        if saved.metadata.get("identity") != identity:
            raise UnicpError(
                f"{path} holds an unfinished calibration of another model, prompts or arguments; finish that one, or "
                "remove the file"
            )
        return cls(saved.tensors, list(saved.metadata["done"]), dict(saved.metadata["facts"]))


def _width(module: Any) -> int:
    """Channels of a unit's output: those of its widest output projection, or of its last layer."""
    layers = {name: getattr(m, "out_features", getattr(m, "out_channels", 0)) for name, m in module.named_modules()}
    projections = [width for name, width in layers.items() if "out" in name.split(".")[0] and width]
    return max(projections, default=next((width for width in reversed(layers.values()) if width), 0))


class _Job:
    """One calibration: makes the runs, and the profile from what they measure."""

    def __init__(
        self,
        pipe: Any,
        denoisers: dict[str, Any],
        specs: dict[str, ModelSpec],
        config: UniCPConfig,
        prompts: list[str | None],
        call: Mapping[str, Any],
        seed: int,
        tokens: int,
        host: bool,
    ) -> None:
        self.pipe, self.denoisers, self.specs, self.config = pipe, denoisers, specs, config
        self.prompts, self.call, self.seed, self.tokens, self.host = prompts, call, seed, tokens, host

    def what_is_kept(self) -> str:
        """A sentence on the memory that the runs will take beside the model's own."""
        most, devices = 0, set[str]()
        for name, denoiser in self.denoisers.items():
            units, weight = self.specs[name].units(denoiser), next(iter(denoiser.parameters()))
            widths = [_width(unit.module) * (2 if unit.kind == "joint_attention" else 1) for unit in units]
            # One more for the residual of the whole stack, which is no wider than any of them.
            # Outputs are not stored in fewer than two bytes, whatever weights are.
            size = max(2, torch.empty(0, dtype=getattr(denoiser, "dtype", weight.dtype)).element_size())
            most += (self.config.max_window + 1) * self.tokens * (sum(widths) + max(widths)) * size
            devices.add(str(getattr(self.pipe, "_execution_device", weight.device)))
        on = " and ".join(sorted(devices))
        where = "in the host's memory" if self.host else f"on {on} (with host=True, --host: in the host's memory)"
        return f"Calibrating keeps at most {readable_bytes(most)} for each guidance branch of a video, {where}."

    def identity(self, runs: list[tuple[str, int]]) -> str:
        """A hash of everything that decides what is measured."""
        values = [
            [
                {name: fingerprint(denoiser) for name, denoiser in self.denoisers.items()},
                weights_digest(self.denoisers),
            ],
            [self.config.to_dict(), self.prompts, self.seed, self.tokens, runs, type(self.pipe.scheduler).__name__],
            {name: identity(value) for name, value in sorted(self.call.items())},
        ]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def run(self, phase: str, index: int, state: _State, show: Callable[[int, int], None]) -> None:
        """Run the pipeline once. Its measurements are added to the state only when the run is complete."""
        sums = Sums({name: tensor.clone() for name, tensor in state.sums.tensors.items()})
        recorders: dict[str, Recorder] = {}
        limit = int(self.call.get("num_inference_steps") or _default_steps(self.pipe))
        uncached = {} if phase == "errors" else self._uncached(state, few=phase == "slicing")

        def on_step(tick: Any) -> None:
            show(tick.step.index + 1, tick.step.count or limit)

        for name, denoiser in self.denoisers.items():
            common = (denoiser, name, self.specs[name], self.pipe, sums, on_step)
            if phase == "errors":
                window = self.config.max_window
                recorders[name] = ErrorRecorder(
                    *common, window=window, damping=self.config.damping, tokens=self.tokens, host=self.host, limit=limit
                )
            else:
                kind = MomentRecorder if phase == "bases" else SlicingRecorder
                recorders[name] = kind(*common, uncached=uncached[name])
        arguments: dict[str, Any] = {"output_type": "latent", **self.call}
        arguments.setdefault("generator", torch.Generator().manual_seed(self.seed + index))
        if self.prompts[index] is not None:
            arguments["prompt"] = self.prompts[index]
        with ExitStack() as stack:
            stack.enter_context(own_bar_hidden(self.pipe))
            for recorder in recorders.values():
                stack.enter_context(recorder)
            self.pipe(**arguments)
        for name, recorder in recorders.items():
            if recorder.sigmas:
                before = state.facts.setdefault("sigmas", {}).setdefault(name, recorder.sigmas)
                if before != recorder.sigmas:
                    raise UnicpError("the runs of this calibration had different sigmas; give fixed arguments")
            if recorder.steps is not None:
                state.facts["steps"] = recorder.steps
        state.sums = sums

    def _uncached(self, state: _State, few: bool) -> dict[str, dict[str, set[int]]]:
        """Positions of steps at which the windows, set by mean errors, leave a unit uncached; by denoiser and unit."""
        found: dict[str, dict[str, set[int]]] = {}
        for name, denoiser in self.denoisers.items():
            units = {u.name: u.kind for u in self.specs[name].units(denoiser) if u.kind in ATTENTION_KINDS}
            sigmas = state.facts.get("sigmas", {}).get(name, [])
            table = TABLES[self.config.fill]
            cache = {u: state.sums.mean(f"{name}/{u}/{table}")[: len(sigmas)].tolist() for u in units}
            errors = UnitErrors(sigmas=sigmas, cache=cache, steps=state.facts.get("steps") or len(sigmas))
            config = self.config.replace(pcas=False, stack=None, edcw="profiled", profile=None, target_speedup=None)
            found[name] = {u: set() for u in units}
            for position, plan in enumerate(planned(config, errors, units)):
                for unit, action in plan.items():
                    if action == "compute":
                        found[name][unit].add(position)
            if few:
                found[name] = {u: _evenly_spaced(sorted(steps), SLICING_STEPS) for u, steps in found[name].items()}
        return found

    def profile(self, state: _State) -> Profile:
        """The profile, with means, maxima and moments from the sums."""
        tensors: dict[str, Any] = {}
        about: dict[str, Any] = {}
        for name, denoiser in self.denoisers.items():
            sigmas = state.facts.get("sigmas", {}).get(name, [])
            units = {u.name: u.kind for u in self.specs[name].units(denoiser)}
            ranks: dict[str, list[int]] = {}
            rows = slice(0, len(sigmas))
            for unit in (*units, STACK):
                for kind, array in (("mean", state.sums.mean), ("max", state.sums.most)):
                    for table in TABLES.values():
                        if state.sums.has(f"{name}/{unit}/{table}"):
                            tensors[f"{name}/{unit}/{table}_{kind}"] = array(f"{name}/{unit}/{table}")[rows]
                if state.sums.has(f"{name}/{unit}/slicing"):
                    tensors[f"{name}/{unit}/slicing"] = state.sums.mean(f"{name}/{unit}/slicing")
                    for moment in ("moment_qk", "moment_v"):
                        tensors[f"{name}/{unit}/{moment}"] = state.sums.tensors[f"{name}/{unit}/{moment}"].float()
                    ranks[unit] = list(rank_grid(tensors[f"{name}/{unit}/moment_qk"].shape[-1]))
            for series in ("metric", "motion"):
                if state.sums.has(f"{name}/{series}"):
                    tensors[f"{name}/{series}"] = state.sums.mean(f"{name}/{series}")[rows]
            about[name] = {
                "class": type(denoiser).__name__,
                "fingerprint": fingerprint(denoiser),
                "sigmas": sigmas,
                "units": units,
                "ranks": ranks,
            }
        import diffusers

        from .. import __version__

        metadata = {
            "versions": {"unicp": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "pipeline": type(self.pipe).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "steps": state.facts.get("steps"),
            "prompts": len(self.prompts),
            "prompts_hash": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16],
            "seed": self.seed,
            "call": {name: v for name, v in self.call.items() if isinstance(v, (int, float, str, bool))},
            "denoisers": about,
        }
        return Profile(config=self.config.replace(profile=None), tensors=tensors, metadata=metadata)


def _evenly_spaced(steps: list[int], most: int) -> set[int]:
    """At most ``most`` of these steps, evenly spaced."""
    if len(steps) <= most:
        return set(steps)
    return {steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)}


def _default_steps(pipe: Any) -> int:
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    default = parameter.default if parameter is not None else None
    return default if isinstance(default, int) else 50
