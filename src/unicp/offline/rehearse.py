"""Finds what methods will cost on a model of any size: it runs the accelerated loop on a pretended device."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engine.report import SessionReport, readable_bytes
from ..errors import UnicpError, UnicpWarning, first_line
from ..hosts.diffusers.components import DENOISERS
from ..hosts.diffusers.session import accelerate
from ..policies.config import Config
from ..policies.unicp import UniCPConfig
from ..specs import find_spec
from .pretend import DEVICE, Device, Pretend, Read, Replayed, Unfilled, Work, by_place
from .published import UNICP, Published
from .published import configs as published_configs

KINDS = {
    "self_attention": "self-attention",
    "spatial_attention": "self-attention",
    "temporal_attention": "self-attention",
    "joint_attention": "self-attention",
    "cross_attention": "cross-attention",
    "mlp": "MLP",
    "rest": "rest",
}
"""Kinds of layers in a rehearsal, by kind of unit; joint attention, among video and text, counts as self-attention."""
DEFAULT_CHANGE = 0.04
"""Relative change per denoising step that measurements are assumed to show; in a real run it depends on the content."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one video costs with one method.

    Attributes:
        operations: floating-point operations, by kind of layer.
        computed_fraction: share of the unaccelerated run's operations.
        seconds: seconds of the denoising loop at best: operators run one after another, each takes the longer of
            operations / peak rate and bytes / bandwidth, and the host is never late.
        speedup: ratio of the unaccelerated loop's seconds to these.
        kept_bytes: the most that is kept from step to step.
        peak_bytes: the most that the loop holds at any time, without weights.
        measuring_bytes: the part of the peak that is neither kept nor in the unaccelerated loop: copies made to
            measure.
        sliced_bytes: memory of sliced weights.
        reads: how often unicp waits for the device.
        their_reads: how often the pipeline, the scheduler and the model wait for it.
        read_places: number of unicp's reads by file and line.
        computed_steps: denoising steps in which the denoiser ran, wholly or in part.
        timeline: one line per guidance branch (:meth:`SessionReport.timeline`).
        notes: notes of the report.
    """

    operations: Mapping[str, int]
    computed_fraction: float
    seconds: float
    speedup: float
    kept_bytes: int
    peak_bytes: int
    measuring_bytes: int
    sliced_bytes: int
    reads: int
    their_reads: int
    read_places: Mapping[str, int]
    computed_steps: int
    timeline: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The result of :func:`rehearse`.

    Attributes:
        model: name of the model.
        width, height: size of the video in pixels.
        frames, steps: its frames, and the denoising steps.
        device: the accelerator of the projection.
        change: relative change per step that measurements were assumed to show.
        weights_bytes: memory of the denoisers' weights.
        plain: figures of the unaccelerated run.
        methods: figures of the methods, by name.
    """

    model: str
    width: int
    height: int
    frames: int
    steps: int
    device: Device
    change: float
    weights_bytes: int
    plain: Figures
    methods: Mapping[str, Figures]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        device = self.device
        lines = [
            f"{self.model}, {self.width}x{self.height}, {self.frames} frames, {self.steps} steps: "
            f"{readable_bytes(self.weights_bytes)} of weights",
            "",
            f"{'':<24}{'PFLOP':>9}{'share':>7}{'steps':>6}{'kept':>11}{'peak':>11}{'measuring':>11}{'reads':>6}{'speed':>8}",
        ]
        for name, each in {"unaccelerated": self.plain, **self.methods}.items():
            lines.append(
                f"{name:<24.24}{sum(each.operations.values()) / 1e15:>9.2f}{each.computed_fraction:>7.0%}"
                f"{each.computed_steps:>6}{readable_bytes(each.kept_bytes):>11}{readable_bytes(each.peak_bytes):>11}"
                f"{readable_bytes(each.measuring_bytes):>11}{each.reads:>6}{each.speedup:>7.2f}x"
            )
        kinds = list(dict.fromkeys(KINDS.values()))
        lines += ["", f"{'PFLOP by kind of layer':<24}" + "".join(f"{kind:>17}" for kind in kinds)]
        for name, each in {"unaccelerated": self.plain, **self.methods}.items():
            lines.append(f"{name:<24.24}" + "".join(f"{each.operations.get(k, 0) / 1e15:>17.2f}" for k in kinds))
        lines += [
            "",
            "Peak: beyond the weights. Reads: how often unicp waits for the device.",
            f"Speed is a projection, not a measurement: a {device.name} ({device.flops / 1e12:g} TFLOPS, "
            f"{device.bandwidth / 1e9:g} GB/s) at which",
            "each operator takes the longer of operations / peak and bytes / bandwidth.",
            f"Where a method measures, each step is assumed to change things by {self.change:g} (--change).",
        ]
        return "\n".join(lines)


def rehearse(
    model: Published,
    configs: Mapping[str, Config],
    *,
    width: int,
    height: int,
    frames: int,
    steps: int,
    device: Device,
    change: float = DEFAULT_CHANGE,
    memory: int | None = None,
    pipe: Any = None,
    on_run: Callable[[str], None] = lambda name: None,
) -> Rehearsal:
    """Run methods on a model without its weights, on a device that has shapes but no values.

    Args:
        model: the model, and how it is called.
        configs: the methods to try, by name.
        width, height: size of the video in pixels.
        frames, steps: its frames, and the denoising steps.
        device: the accelerator of the projection.
        change: relative change per denoising step that measurements are assumed to show.
        memory: bytes of the accelerator's memory. If given, UniCP is also tried with what weights and activations leave
            of it: the last of its configs that is given, or else the published one of all kinds of units.
        pipe: a pipeline of the model on the pretended device, if there is one already.
        on_run: called with the name of the run that comes next.

    Raises:
        UnicpError: the model does not run at this size, a method is refused on it, or a tensor of another device is in
            the way.
    """
    if pipe is None:
        on_run("building")
        with Unfilled():
            pipe = model.build(DEVICE)
    stage = _Stage(pipe, device, change)
    call = {"height": height, "width": width, "num_frames": frames, **model.call}
    call |= model.embeddings(pipe.transformer, DEVICE)
    on_run("unaccelerated")
    few = min(steps, 2)
    # Every step costs the same, so two are enough; where there are two denoisers, each gets one.
    try:
        idle = stage.run(call, few)
    except UnicpError:
        raise
    except Exception as error:
        raise UnicpError(
            f"{model.name} does not run at {width}x{height}, {frames} frames: {first_line(error)}"
        ) from error
    # As in a new process: some schedulers keep timesteps of the video before.
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    work = Work(idle.work.flops * steps // few, idle.work.bytes * steps // few, idle.work.seconds * steps / few)
    if memory is not None:
        room = memory - stage.weights - idle.peak
        if room <= 0:
            raise UnicpError(
                f"{model.name} takes {readable_bytes(stage.weights + idle.peak)} without any method; "
                f"{readable_bytes(memory)} will not do"
            )
        given = [config for config in configs.values() if isinstance(config, UniCPConfig)]
        limited = given[-1] if given else published_configs()[UNICP]
        limited_name = f"unicp in {memory / 1e9:g} GB"
        configs = {**configs, limited_name: limited.replace(max_cache_bytes=room)}
    methods = {}
    kinds: dict[str, int] = {}
    for name, config in configs.items():
        on_run(name)
        tried = _tried(stage, config, call, steps)
        if memory is not None and name == limited_name:
            # What is kept besides units' outputs, and what measuring takes, is known only now.
            while (over := stage.weights + tried.done.peak - memory) > 0 and room > 1:
                room = max(1, room - max(over, room // 16))
                tried = _tried(stage, limited.replace(max_cache_bytes=room), call, steps)
        done, report, spent = tried.done, tried.report, tried.by_kind
        kinds = kinds or tried.whole_by_kind
        seen = list(stage.pretend.reads)
        ours = [read for read in seen if read.ours]
        methods[name] = Figures(
            operations=spent,
            computed_fraction=report.computed_fraction,
            seconds=done.work.seconds,
            speedup=work.seconds / done.work.seconds,
            kept_bytes=report.cache_bytes,
            peak_bytes=done.peak,
            measuring_bytes=max(0, done.peak - idle.peak - report.cache_bytes),
            sliced_bytes=report.sliced_bytes,
            reads=len(ours),
            their_reads=len(seen) - len(ours),
            read_places=by_place(ours),
            computed_steps=report.computed_steps,
            timeline=report.timeline(),
            notes=report.notes,
        )
    plain = Figures(
        operations=kinds or {"rest": work.flops},
        computed_fraction=1.0,
        seconds=work.seconds,
        speedup=1.0,
        kept_bytes=0,
        peak_bytes=idle.peak,
        measuring_bytes=0,
        sliced_bytes=0,
        reads=0,
        their_reads=len(idle.reads) * steps // few,
        read_places={},
        computed_steps=steps,
    )
    return Rehearsal(
        model=model.name, width=width, height=height, frames=frames, steps=steps, device=device, change=change,
        weights_bytes=stage.weights, plain=plain, methods=methods,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    work: Work
    peak: int
    reads: list[Read]


class _Stage:
    """A pipeline on the pretended device, whose repeated modules run once and are replayed afterwards."""

    def __init__(self, pipe: Any, device: Device, change: float) -> None:
        self.pipe = pipe
        self.branches = 1
        self.pretend = Pretend(device, answer=lambda calls: change * max(1, round(calls / self.branches)))
        self.weights = 0
        for name in DENOISERS:
            denoiser = getattr(pipe, name, None)
            if denoiser is None:
                continue
            self.weights += self.pretend.weights(denoiser)
            denoiser.register_forward_pre_hook(self._begin)
            spec = find_spec(denoiser)
            if spec is not None:
                for unit in spec.units(denoiser):
                    Replayed(self.pretend, unit.module, counted=True)
                for _, block, _ in spec.blocks(denoiser):
                    Replayed(self.pretend, block)

    def _begin(self, *_: Any) -> None:
        self.pretend.calls += 1

    def run(self, call: Mapping[str, Any], steps: int) -> _Run:
        pretend = self.pretend
        pretend.reads.clear()
        pretend.calls, before = 0, pretend.work
        pretend.mark()
        held = pretend.memory.now
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), pretend:
            self.pipe(**call, num_inference_steps=steps, output_type="latent", generator=generator)
        self.branches = max(1, round(pretend.calls / steps))
        return _Run(pretend.work.minus(before), pretend.memory.peak - held, list(pretend.reads))


@dataclass(frozen=True)
class _Tried:
    done: _Run
    report: SessionReport
    by_kind: dict[str, int]
    whole_by_kind: dict[str, int]


def _tried(stage: _Stage, config: Config, call: Mapping[str, Any], steps: int) -> _Tried:
    """Run a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnicpWarning)  # the figures show it if a method never acted
        session = accelerate(stage.pipe, config)
        try:
            done = stage.run(call, steps)
            with stage.pretend:  # the last step's measurements are fetched only now
                report = session.report()
            tried = _Tried(done, report, _by_kind(session, report), _whole_by_kind(session, report))
        finally:
            session.restore()
    _check(tried)
    return tried


def _check(tried: _Tried) -> None:
    """Check that the report counts what has run, in all and by kind.

    Raises:
        UnicpError: it differs by more than 1%.
    """
    seen = tried.done.work.flops
    for counted in (tried.report.operations, sum(tried.by_kind.values())):
        if abs(counted - seen) > 0.01 * seen:
            raise UnicpError(
                f"the report says {counted:.4g} operations, and {seen:.4g} were seen; this is a fault of unicp, please "
                "report it"
            )


def _by_kind(session: Any, report: SessionReport) -> dict[str, int]:
    """Operations that ran, by kind of layer."""
    hooked = {each.name: each for each in session._hooked}
    found: Counter[str] = Counter()
    for record in report.steps:
        of = hooked[record.denoiser]
        cost = of.parts.meter.cost(record.branch)
        if record.action in ("compute", "partial"):
            spent = of.parts.meter.by_kind(record.branch, record.units)
        else:
            spent = {"rest": cost.total - cost.stack if of.needs.keep == "stack" else 0}
        for kind, count in spent.items():
            found[KINDS[kind]] += count
    return dict(found)


def _whole_by_kind(session: Any, report: SessionReport) -> dict[str, int]:
    """Operations of the same calls in full."""
    hooked = {each.name: each for each in session._hooked}
    found: Counter[str] = Counter()
    for record in report.steps:
        meter = hooked[record.denoiser].parts.meter
        for kind, count in meter.cost(record.branch).by_kind(meter.kinds).items():
            found[KINDS[kind]] += count
    return dict(found)
