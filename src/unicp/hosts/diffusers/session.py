"""``accelerate`` and ``restore``: a config put on a pipeline or a module, and taken off again."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

from ...engine.report import Generation, SessionReport, StepRecord
from ...engine.turns import Turns
from ...errors import UnicpError, UnicpWarning
from ...policies import Config, Needs, make_policy
from ...profiles import played, read, resolve_config
from ...specs import ModelSpec, find_spec, known_specs
from ...specs.discovery import discover
from . import hooks
from .compiled import original
from .components import find_denoisers
from .denoiser import HookedDenoiser
from .refusals import check_denoiser

KEPT_REPORTS = 100
"""Of a session: the records of a video take some 50 kB, and a server makes videos without end."""

_SESSIONS: weakref.WeakKeyDictionary[HookedDenoiser, weakref.ref[Session]] = weakref.WeakKeyDictionary()


class Session:
    """An acceleration in force. A context manager: leaving it restores.

    Made by :func:`accelerate`. Holds one independent state for each denoiser.

    Attributes:
        config: what was asked for.
        made: how many videos were made with it.
    """

    def __init__(
        self, denoisers: dict[str, Any], config: Config, acting: Config, specs: dict[str, Any], pipe: Any, group: Any
    ) -> None:
        self.config, self.made = config, 0
        self._generation: Generation | None = None
        self._reports: deque[SessionReport] = deque(maxlen=KEPT_REPORTS)
        self._warned = False
        self._denoisers, self._specs, self._group = denoisers, specs, group
        self._acting = acting.shared(len(denoisers))
        self._pipe = weakref.ref(pipe) if pipe is not None else lambda: None
        self._hooked: list[HookedDenoiser] = []
        self._turns = Turns(self._is_over, self._end)
        try:
            self._install(denoisers)
        except BaseException:
            self.restore()
            raise

    def _install(self, names: Iterable[str]) -> None:
        """Act on these denoisers, and no longer by what acted on them before."""
        found = {each.name: each for each in self._hooked}
        for name in names:
            found[name] = hooked = HookedDenoiser(
                self._denoisers[name], name, self._acting, self._specs[name], self._pipe(), self._begin, self._close,
                self._group,
            )  # fmt: skip
            self._hooked = list(found.values())
            _SESSIONS[hooked] = weakref.ref(self)
            hooked.leaper.alone = len(self._denoisers) == 1
            hooked.turns = self._turns
        for hooked in self._hooked:
            hooked.clock.beside = [each.clock for each in self._hooked if each is not hooked]

    def put_back(self, names: Iterable[str]) -> None:
        """Act on these denoisers again, as another session that should replace this one could not begin."""
        try:
            self._install(names)
        except Exception as error:
            said = f"the {self.config.method} that was in force could not be put back: {error}; the model computes all"
            warnings.warn(said, UnicpWarning, stacklevel=4)

    def _begin(self, hooked: HookedDenoiser) -> Generation:
        check_denoiser(hooked.denoiser, self._pipe(), self.config.method, hooked.needs, self._group)
        others = [other for other in self._hooked if other is not hooked]
        if self._generation is not None and hooked.name in self._generation.denoisers:
            for other in others:  # they may not know yet that the last video broke off
                other.end()
            self._close()
        if self._generation is None:
            self._generation = Generation(self.config.method)
        for other in others:
            other.rest()
        self._generation.denoisers.add(hooked.name)
        return self._generation

    def _close(self) -> None:
        """Turn the generation in progress into a report, once none of the denoisers is in it any more."""
        generation = self._generation
        if generation is None or any(each.run is not None for each in self._hooked):
            return
        self._generation = None
        self._reports.append(generation.report(self._notes(generation)))
        self.made += 1
        if generation.complete and not generation.acted and not self._warned:
            self._warned = True
            why = next(iter(generation.idle.values()))
            warnings.warn(f"unicp {self.config.method} never acted in this run: {why}", UnicpWarning, stacklevel=2)

    def _notes(self, generation: Generation) -> list[str]:
        """What the method could not do, in the words of the denoisers; where they differ, whose words."""
        under_way = {each.name: each.run.notes() for each in self._hooked if each.run is not None}
        every = {name: list(dict.fromkeys(notes)) for name, notes in {**generation.said, **under_way}.items()}
        said = {each.name: every[each.name] for each in self._hooked if every.get(each.name)}
        if len(said) < 2:
            return [note for notes in said.values() for note in notes]
        common = [note for note in next(iter(said.values())) if all(note in notes for notes in said.values())]
        return common + [f"{name}: {note}" for name, notes in said.items() for note in notes if note not in common]

    def _end_if_complete(self) -> None:
        """Close the video whose last step was seen. One that is in progress is left alone: it may go on."""
        for each in self._hooked:
            if each.run is not None:
                each.run.settle()
        if self._generation is not None and self._generation.complete:
            for each in self._hooked:
                each.end()

    def _is_over(self) -> bool:
        """Whether the video in progress has seen its last call."""
        return all(each.is_over() for each in self._hooked)

    def _end(self) -> None:
        for each in self._hooked:
            each.end()

    def end(self) -> None:
        """The video in progress is over, however far it came: the next call of a denoiser begins another."""
        self._end()
        self._close()

    def warn_again(self) -> None:
        """Let the next video say it, too, if nothing was skipped: else a session says so once."""
        self._warned = False

    def report(self) -> SessionReport:
        """What was done for the last video; for the one in progress, or broken off, so far.

        Raises:
            UnicpError: no video was begun yet.
        """
        self._end_if_complete()
        if self._generation is not None:
            return self._generation.report(self._notes(self._generation))
        swapped = self._swapped()
        if not self._reports:
            raise UnicpError(f"there is no report yet: {swapped or 'generate a video first'}")
        if swapped:
            warnings.warn(f"this is the report of an earlier video: {swapped}", UnicpWarning, stacklevel=2)
        return self._reports[-1]

    def _swapped(self) -> str:
        """What was put in the place of a denoiser since it was accelerated, and what to do; empty if nothing was."""
        pipe = self._pipe()
        names = [n for n, own in self._denoisers.items() if original(getattr(pipe, n, own)) is not own]
        if pipe is None or not names:
            return ""
        return (
            f"{names[0]} of the pipeline is another module than the one that was accelerated, so that nothing is "
            "skipped; accelerate the pipeline again"
        )

    def of(self, pipe: Any) -> bool:
        """Whether it acts on this pipeline."""
        return pipe is not None and self._pipe() is pipe

    def leave_all_but(self, denoisers: Iterable[Any]) -> None:
        """Act no longer on what was swapped for one of these."""
        for each in self._hooked:
            if not any(each.denoiser is denoiser for denoiser in denoisers):
                each.remove()

    @property
    def reports(self) -> list[SessionReport]:
        """One report for each of the last hundred videos (``KEPT_REPORTS``); not for the one in progress."""
        self._end_if_complete()
        return list(self._reports)

    @property
    def records(self) -> list[StepRecord]:
        """What was done so far for the video in progress; for a progress bar, as some measurements are still due."""
        return list(self._generation.records) if self._generation is not None else []

    def cached_tensors(self) -> list[Any]:
        """The tensors that are kept at this moment; none between two videos."""
        return [tensor for each in self._hooked if each.run is not None for tensor in each.run.tensors()]

    def restore(self) -> None:
        """Take everything of ours off again. Doing it twice does no harm."""
        for each in self._hooked:
            each.remove()
        self._hooked, self._denoisers, self._specs = [], {}, {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def accelerate(pipe_or_module: Any, config: Any, *, spec: ModelSpec | None = None, group: Any = None) -> Session:
    """Make a diffusers video pipeline faster, in place.

    Args:
        pipe_or_module: a diffusers pipeline, or its transformer alone. Of a pipeline with two denoisers (Wan 2.2)
            both are accelerated, each with a state of its own. Give the pipeline where you can: its scheduler tells
            how many steps there are and where a video begins.
        config: a config such as ``AdaCacheConfig()``, the name of a method (``"adacache"``), a :class:`Profile` or the
            path of one.
        spec: the structure of a model that is not built in. Without one, methods that look at blocks only take the
            list of blocks that holds most of the denoiser's parameters, and check at the first call that it will do.
        group: processes over which a model's tokens are spread (dimension 1 of its hidden states, evenly). Only for
            models that are split by hand: what diffusers' ``enable_parallelism`` has split is known without it.
            Or processes that run one branch of guidance each: all then decide by what the branches measure together;
            not with ``moreg``, which would take the one branch's frames for a sequel of the other's.

    Returns:
        The :class:`Session`. An earlier acceleration of the same denoisers by unicp is replaced; if this one is
        refused, the earlier one stays in force.

    Raises:
        UnicpError: the target or the config is none of these; the method looks into the blocks of a denoiser whose
            structure is not known; the denoiser keeps keys from call to call, or another cache acts on it; its weights
            are sharded over processes that would decide apart.
    """
    denoisers, pipe = find_denoisers(pipe_or_module)
    resolved = resolve_config(config)
    acting = played(read(resolved))
    needs = make_policy(acting).needs()
    for denoiser in denoisers.values():
        check_denoiser(denoiser, pipe, resolved.method, needs, group)
    specs = {name: spec or _spec_of(denoiser, acting, needs) for name, denoiser in denoisers.items()}
    earlier = _in_force(denoisers.values())
    restore(pipe_or_module)
    try:
        return Session(denoisers, resolved, acting, specs, pipe, group)
    except BaseException:
        for session, names in earlier.items():
            session.put_back(names)
        raise


def _in_force(denoisers: Iterable[Any]) -> dict[Session, list[str]]:
    """The sessions that act on these denoisers, and what they call them."""
    found: dict[Session, list[str]] = {}
    for denoiser in denoisers:
        hook = hooks.find(denoiser, hooks.HOOK)
        known = _SESSIONS.get(hook.owner) if hook is not None else None
        session = known() if known is not None else None
        if session is not None:
            found.setdefault(session, []).append(hook.owner.name)
    return found


def _spec_of(denoiser: Any, config: Config, needs: Needs) -> ModelSpec | None:
    """What is known of a denoiser: registered, or where the method must know it, found by structure."""
    found = find_spec(denoiser)
    if found is None and needs.inside and not needs.units:
        found = discover(denoiser)
    if found is None and needs.inside:
        what = "attention modules and MLPs" if needs.units else "blocks"
        raise UnicpError(
            f"{config.method} looks into the {what} of the denoiser, and the structure of {type(denoiser).__name__} is "
            f"not known; known: {', '.join(sorted(known_specs()))}. Describe it with a ModelSpec (spec=...), or use a "
            "ScheduleConfig, which works on any denoiser"
        )
    return found


def restore(pipe_or_module: Any) -> None:
    """Remove everything of unicp from a pipeline or module, in whatever order other hooks came and went."""
    denoisers, pipe = find_denoisers(pipe_or_module)
    for session in {known() for known in _SESSIONS.values()}:
        if session is not None and session.of(pipe):
            session.leave_all_but(list(denoisers.values()))
    for denoiser in denoisers.values():
        hook = hooks.find(denoiser, hooks.HOOK)
        if hook is not None:
            hook.owner.remove()
