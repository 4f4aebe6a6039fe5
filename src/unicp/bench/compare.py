"""``compare`` makes the runs in an order that is fair to every method, and saves each as it finishes."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UnicpError, UnicpWarning
from ..profiles.identity import settings, weights_digest
from ..progress import progress_bar
from . import quality, sprites, store
from .comparison import Comparison
from .harness import Made, denoisers_of, generate, step_count
from .isolation import fresh, without_offloading
from .observe import observing
from .peers import Peer, Run, resolve
from .provenance import environment, provenance
from .results import Failure, Point, Result

BASELINE = "unaccelerated"
WARM_UP_STEPS = 2
"""Denoising steps of the warm-up."""


@dataclass(frozen=True)
class Progress:
    """Progress of a comparison: runs done, all runs, the present one, and about how many seconds the rest will take."""

    done: int
    total: int
    what: str
    seconds_left: float | None


@dataclass(frozen=True)
class _Entry:
    """A point to measure; ``peer`` is ``None`` for the baseline."""

    peer: Peer | None
    label: str

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.label}" if self.peer is not None else BASELINE


def compare(
    pipe: Any,
    configs: Any = None,
    prompts: Sequence[str] | str | None = None,
    *,
    seed: int = 0,
    repeats: int = 1,
    results: str | Path | None = None,
    calibration_prompt: str | None = None,
    progress: bool | Callable[[Progress], None] = True,
    **call: Any,
) -> Comparison:
    """Measure methods against the unaccelerated pipeline: wall-clock, operations, memory, and quality at the same seed.

    Every run has a fresh pipeline that shares only weights. Before anything is timed, each setting makes one video of
    the first prompt, during which its operations are counted; that video is discarded. Then all methods take turns,
    prompt by prompt, after the unaccelerated pipeline.

    Args:
        pipe: a bare diffusers video pipeline, offloaded model by model or not. It is not changed.
        configs: names (``"adacache"``, ``"fewer-steps"``, ``"first-block-cache=0.05:0.1"``), configs, paths of
            profiles, or a mapping from labels to configs; ``None`` compares everything that is known.
        prompts: prompts of one video each; ``None`` when ``call`` carries ``prompt_embeds``.
        seed: seed of the noise, the same for all runs.
        repeats: how often every video is made, at least once; more make the timing of few prompts steadier.
        results: path of a file (SQLite) that keeps every run. With it an interrupted comparison resumes, and a later
            one makes only what is new and, in the same round, the unaccelerated run once more, as a machine is not
            equally fast at every hour. A result is used again only for the same model, call, versions and machine.
        calibration_prompt: prompt for methods that calibrate first (MagCache); by default the first prompt.
        progress: whether to show a bar, or a function to call with the :class:`Progress` of every run.
        **call: arguments of the pipeline's call.

    Returns:
        The :class:`~unicp.bench.comparison.Comparison`. A method that does not apply, or fails, is in its
        ``failures`` with its own error.

    Raises:
        UnicpError: there is nothing to compare, there are no prompts, an argument of the call is set by ``compare``
            itself, or the pipeline is accelerated, or offloaded in another way than model by model.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if prompts is None and "prompt_embeds" not in call:
        raise UnicpError("compare needs prompts, as in compare(pipe, ['adacache'], ['a cat on a surfboard'])")
    texts: list[str | None] = [None] if prompts is None else list(prompts)
    if not texts:
        raise UnicpError("compare needs at least one prompt")
    for word in ("generator", "output_type", "callback_on_step_end"):
        if word in call:
            raise UnicpError(f"compare sets {word} itself; leave it out (seed={seed} makes the noise)")
    if repeats < 1:
        raise UnicpError(f"repeats must be 1 or more, got {repeats}")
    peers = resolve(configs)
    kept = store.Store(results)
    try:
        with without_offloading(pipe) as device:
            comparing = _Comparing(pipe, device, peers, texts, seed, repeats, kept, calibration_prompt, call)
            with _shown(progress) as show, _quiet_diffusers(), warnings.catch_warnings():
                # A setting that never skips anything is a point of a curve like others; the results say so.
                warnings.simplefilter("ignore", UnicpWarning)
                return comparing.run(show)
    finally:
        kept.close()


class _Comparing:
    def __init__(
        self, pipe: Any, offloaded_to: Any, peers: Sequence[Peer], prompts: list[str | None], seed: int, repeats: int,
        kept: store.Store, calibration_prompt: str | None, call: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.offloaded_to = offloaded_to
        self.pipe, self.peers, self.prompts, self.seed, self.repeats = pipe, peers, prompts, seed, repeats
        self.kept, self.call = kept, dict(call)
        self.calibration_prompt = calibration_prompt or prompts[0]
        fresh(pipe)  # refuses a pipeline that is not bare, before minutes are spent
        modules = denoisers_of(pipe)
        self.steps = step_count(pipe, call)
        self.about: dict[str, Any] = {
            "model": {"pipeline": type(pipe).__name__, "weights": weights_digest(modules)},
            "scheduler": {"class": type(pipe.scheduler).__name__, **settings(pipe.scheduler)},
            "seed": seed,
            "call": self.call,
            "environment": environment(pipe),
        }
        if offloaded_to is not None:
            self.about["offload"] = str(offloaded_to)
        self.calibrated: dict[str, Any] = {}
        self.failures: list[Failure] = []
        self.warm: set[str] = set()
        self.done, self.total, self.spent, self.timed = 0, 0, 0.0, 0

    # --- the order ---

    def run(self, show: Callable[[Progress], None]) -> Comparison:
        baseline = _Entry(None, "")
        entries = [_Entry(peer, label) for peer in self.peers for label in peer.labels(self.steps)]
        self.total = (1 + len(entries)) * (1 + len(self.prompts) * self.repeats)
        self.show = show
        began = time.time()
        observed: dict[str, dict[str, Any]] = {BASELINE: self._observe(baseline)}
        self._calibrate()
        alive = []
        for entry in entries:
            assert entry.peer is not None
            try:
                observed[entry.name] = self._observe(entry)
                alive.append(entry)
            except Exception as error:
                self._failed(entry, error)
                self.total -= len(self.prompts) * self.repeats
        results: dict[str, list[Result]] = {entry.name: [] for entry in (baseline, *alive)}
        for repeat in range(self.repeats):
            for number, prompt in enumerate(self.prompts):
                reference = self._reference(baseline, alive, prompt, number, repeat)
                results[BASELINE].append(reference)
                # Each round starts with a different entry, so that none always runs after the same neighbour.
                turn = (number + repeat) % max(1, len(alive))
                for entry in alive[turn:] + alive[:turn]:
                    try:
                        results[entry.name].append(self._timed(entry, prompt, number, repeat, reference))
                    except Exception as error:
                        self._failed(entry, error)
                        alive.remove(entry)  # an incomplete entry is not compared, so it makes no more runs
                        self.total -= (self.repeats - repeat) * len(self.prompts) - number - 1
        points = [
            Point(
                method=entry.peer.name,
                label=entry.label,
                ours=entry.peer.ours,
                source=entry.peer.source,
                note=entry.peer.note,
                settings=entry.peer.settings(entry.label),
                results=tuple(results[entry.name]),
                observed=observed[entry.name],
            )
            for entry in alive
            if entry.peer is not None
        ]
        judged = [result.quality for point in points for result in point.results]
        methods = {peer.name: f"{peer.library} {peer.version()}" for peer in self.peers}
        return Comparison(
            baseline=Point(
                method=BASELINE, label=f"steps={self.steps}", ours=False, source="", note="", settings={},
                results=tuple(results[BASELINE]), observed=observed[BASELINE],
            ),
            points=tuple(points),
            failures=tuple(self.failures),
            prompts=tuple(self.prompts),
            steps=self.steps,
            repeats=self.repeats,
            seed=self.seed,
            notes=tuple(note for note in (quality.lpips_note(judged),) if note),
            provenance=provenance(self.pipe, self.about, methods, began),
        )  # fmt: skip

    # --- one run ---

    def _key(self, kind: str, entry: _Entry, prompt: str | None, repeat: int = 0) -> store.Key:
        method: dict[str, Any] = {"name": BASELINE}
        if entry.peer is not None:
            calibration = self.calibration_prompt if entry.peer.calibrates else None
            version = entry.peer.version()
            method = {"name": entry.peer.name, "version": version, "calibration": calibration}
            if entry.label:
                method.update(entry.peer.settings(entry.label))
        return store.Key({**self.about, "kind": kind, "method": method, "prompt": prompt, "repeat": repeat})

    def _calibrate(self) -> None:
        for peer in self.peers:
            if not peer.calibrates:
                continue
            key = self._key("calibration", _Entry(peer, ""), self.calibration_prompt)
            known = self.kept.get(key)
            try:
                if known is None:
                    run = Run(self._fresh(), self._with_prompt(self.calibration_prompt))
                    known = {"value": peer.calibrate(run, lambda pipe, call: generate(pipe, call, seed=self.seed))}
                    self.kept.put(key, known)
                self.calibrated[peer.name] = known["value"]
            except Exception as error:
                self.calibrated[peer.name] = error  # becomes the error of each of its settings

    def _fresh(self) -> Any:
        return fresh(self.pipe, self.offloaded_to)

    def _with_prompt(self, prompt: str | None) -> dict[str, Any]:
        return dict(self.call) if prompt is None else {"prompt": prompt, **self.call}

    @contextmanager
    def _applied(self, entry: _Entry, prompt: str | None) -> Iterator[tuple[Run, Mapping[str, Any]]]:
        """A run with a fresh pipeline that has the method on it, and the arguments to call it with."""
        calibrated = self.calibrated.get(entry.peer.name if entry.peer else "")
        run = Run(self._fresh(), self._with_prompt(prompt), calibrated)
        if isinstance(run.calibrated, Exception):
            raise run.calibrated
        try:
            yield run, run.call if entry.peer is None else entry.peer.apply(run, entry.label)
        finally:
            if entry.peer is not None:
                entry.peer.remove(run)

    def _observe(self, entry: _Entry) -> dict[str, Any]:
        """The discarded run: a warm-up in which operations are counted and decisions are observed."""
        prompt = self.prompts[0]
        key = self._key("observation", entry, prompt)
        known = self.kept.get(key)
        if known is not None:
            self._step(entry, 0.0, fresh_run=False)
            return known
        began = time.perf_counter()
        with self._applied(entry, prompt) as (run, call), observing(run.pipe) as (seen, end_step):
            generate(run.pipe, call, seed=self.seed, on_step=lambda *_: end_step())
        found = seen.to_dict()
        self.warm.add(entry.name)
        self.kept.put(key, found)
        self._step(entry, time.perf_counter() - began)
        return found

    def _known(self, entry: _Entry, prompt: str | None, number: int, repeat: int) -> Result | None:
        key = self._key("run", entry, prompt, repeat)
        known = self.kept.get(key)
        if known is None:
            return None
        return Result.from_dict(known, number, repeat, self.kept.blob(key, "video"), self.kept.blob(key, "raw"))

    def _reference(
        self, baseline: _Entry, alive: Sequence[_Entry], prompt: str | None, number: int, repeat: int
    ) -> Result:
        """The unaccelerated video, timed again if anything else in this round is new: machines vary by the hour."""
        known = self._known(baseline, prompt, number, repeat)
        if known is None:
            return self._made(baseline, prompt, number, repeat, None)
        if all(self.kept.get(self._key("run", entry, prompt, repeat)) is not None for entry in alive):
            self._step(baseline, 0.0, fresh_run=False)
            return known
        began = time.perf_counter()
        made, _ = self._run(baseline, prompt)
        self._step(baseline, time.perf_counter() - began)
        # Saved results were judged against the saved video.
        return replace(known, loop_seconds=made.loop_seconds, total_seconds=made.total_seconds)

    def _timed(self, entry: _Entry, prompt: str | None, number: int, repeat: int, reference: Result) -> Result:
        known = self._known(entry, prompt, number, repeat)
        if known is None:
            return self._made(entry, prompt, number, repeat, reference)
        self._step(entry, 0.0, fresh_run=False)
        return known

    def _run(self, entry: _Entry, prompt: str | None) -> tuple[Made, Any]:
        """A timed run, and the method's report of it."""
        if entry.name not in self.warm:  # in a resumed comparison, one-time costs of the process must not be timed
            with self._applied(entry, prompt) as (run, call):
                # The baseline warms up with two steps; some methods need their full number.
                generate(
                    run.pipe, call if entry.peer else {**call, "num_inference_steps": WARM_UP_STEPS}, seed=self.seed
                )
            self.warm.add(entry.name)
        gc.collect()
        with self._applied(entry, prompt) as (run, call):
            made = generate(run.pipe, call, seed=self.seed)
            return made, entry.peer.report(run) if entry.peer is not None else None

    def _made(self, entry: _Entry, prompt: str | None, number: int, repeat: int, reference: Result | None) -> Result:
        began = time.perf_counter()
        made, report = self._run(entry, prompt)
        result = self._judge(made, report, prompt, number, repeat, reference)
        video = sprites.sheet(made.frames)
        blobs = {"video": video}
        if entry.peer is None:
            raw = store.pack(frames=store.sixteen_bits(made.frames), latents=_numpy(made.latents))
            blobs["raw"] = raw
            result = result.with_blobs(video, raw)
        else:
            result = result.with_blobs(video, None)
        self.kept.put(self._key("run", entry, prompt, repeat), result.to_dict(), **blobs)
        self._step(entry, time.perf_counter() - began)
        return result

    def _judge(
        self, made: Made, report: Any, prompt: str | None, number: int, repeat: int, reference: Result | None
    ) -> Result:
        frames = store.from_sixteen_bits(store.sixteen_bits(made.frames))
        distances: dict[str, float | None] = {}
        if reference is not None:
            assert reference.raw is not None
            held = store.unpack(reference.raw)
            latents = made.latents.numpy() if made.latents is not None else None
            distances = quality.distances(
                frames, store.from_sixteen_bits(held["frames"]), _tensor(latents), _tensor(held.get("latents"))
            )
        return Result(
            prompt=number,
            repeat=repeat,
            loop_seconds=made.loop_seconds,
            total_seconds=made.total_seconds,
            peak_bytes=made.peak_bytes,
            cache_bytes=None if report is None else report.cache_bytes,
            quality=distances,
            beside=None if reference is None else reference.seconds,
            caption=quality.caption_check(frames, prompt),
            shape=tuple(frames.shape),
        )

    # --- messages and progress ---

    def _failed(self, entry: _Entry, error: Exception) -> None:
        assert entry.peer is not None
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
        self.failures.append(Failure(entry.peer.name, entry.label, text if len(text) <= 400 else text[:397] + "..."))
        self._step(entry, 0.0, fresh_run=False)

    def _step(self, entry: _Entry, seconds: float, *, fresh_run: bool = True) -> None:
        self.done += 1
        if fresh_run:
            self.spent, self.timed = self.spent + seconds, self.timed + 1
        left = self.spent / self.timed * (self.total - self.done) if self.timed else None
        self.show(Progress(self.done, self.total, entry.name, left))


def _numpy(latents: Any) -> Any:
    return None if latents is None else latents.numpy()


def _tensor(array: Any) -> Any:
    import torch

    return None if array is None else torch.from_numpy(array)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers within the block: some caches log a warning each time they are put on, so in every run."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def _shown(progress: bool | Callable[[Progress], None]) -> Iterator[Callable[[Progress], None]]:
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    with progress_bar(True, "comparing") as shown:
        yield lambda at: shown(at.what, at.done, at.total)
