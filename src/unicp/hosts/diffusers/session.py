"""``accelerate`` puts a config on a pipeline or a module, and ``restore`` takes it off again."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from ...engine.clock import takeover
from ...engine.report import Generation, SessionReport, StepRecord
from ...engine.turns import Turns
from ...errors import UnicpError, UnicpWarning
from ...policies import Config, Needs, make_policy
from ...profiles import read, resolve_config
from ...specs import ModelSpec, find_spec, known_specs
from ...specs.discovery import discover
from . import hooks
from .compiled import original
from .components import find_denoisers
from .denoiser import HookedDenoiser
from .refusals import check_denoiser

KEPT_REPORTS = 100
"""Reports that a session keeps: the records of a video take some 50 kB, and a server makes videos without end."""
SHARED_NOTE = (
    "{name} is shared by two pipelines, and was accelerated through the other one: what was put on last acts in both; "
    "give each pipeline a {name} of its own (copy.deepcopy before accelerating) if they are to differ"
)

_SESSIONS: weakref.WeakKeyDictionary[HookedDenoiser, weakref.ref[Session]] = weakref.WeakKeyDictionary()


class Session:
    """An acceleration in force, made by :func:`accelerate`. It holds an independent state for each denoiser.

    It is a context manager: leaving the block restores the model.

    Attributes:
        config: what was asked for.
        made: how many videos were made with it.
    """

    def __init__(
        self, denoisers: dict[str, Any], config: Config, acting: Config, specs: dict[str, Any], pipe: Any, group: Any,
        plans: Callable[[], Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.made = config, 0
        self._generation: Generation | None = None
        self._reports: deque[SessionReport] = deque(maxlen=KEPT_REPORTS)
        self._warned = False
        self._denoisers, self._specs, self._group, self._plans = denoisers, specs, group, plans
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
        """Act on these denoisers, in place of what acted on them before."""
        found = {each.name: each for each in self._hooked}
        for name in names:
            found[name] = hooked = HookedDenoiser(
                self._denoisers[name], name, self._acting, self._specs[name], self._pipe(), self._begin, self._close,
                self._group, self._plans,
            )  # fmt: skip
            self._hooked = list(found.values())
            _SESSIONS[hooked] = weakref.ref(self)
            hooked.turns = self._turns
        for hooked in self._hooked:
            hooked.leaper = self._hooked[0].leaper  # they have one solver
            hooked.leaper.allowed = len(self._denoisers) == 1 or takeover(self._pipe()) is not None
            hooked.clock.beside = [each.clock for each in self._hooked if each is not hooked]

    def put_back(self, names: Iterable[str]) -> None:
        """Act on these denoisers again, after the session that was to replace this one could not begin."""
        try:
            self._install(names)
        except Exception as error:
            said = f"the {self.config.method} that was in force could not be put back: {error}; the model computes all"
            warnings.warn(said, UnicpWarning, stacklevel=4)

    def _begin(self, hooked: HookedDenoiser) -> Generation:
        check_denoiser(hooked.denoiser, self._pipe(), self.config.method, hooked.needs, self._group)
        for config in (self._acting, getattr(self._acting, "stack", None)):
            profile = getattr(config, "profile", None)
            if profile is not None and self._plans is None:
                profile.check_scheduler(self._pipe())  # it may be another one by now
        others = [other for other in self._hooked if other is not hooked]
        if self._generation is not None and hooked.name in self._generation.denoisers:
            for other in others:  # they may not know yet that the last video broke off
                other.end()
            self._close()
        if self._generation is None:
            self._generation = Generation(self.config.method)
        hooked.left = {branch: fill for other in others for branch, fill in other.rest().items()}
        self._generation.denoisers.add(hooked.name)
        return self._generation

    def _close(self) -> None:
        """Turn the generation in progress into a report, once no denoiser is in it any more."""
        generation = self._generation
        if generation is None or any(each.run is not None for each in self._hooked):
            return
        self._generation = None
        notes = self._notes(generation)
        idle = next(iter(generation.idle.values())) if generation.complete and not generation.acted else ""
        if idle and idle not in notes:
            notes.append(f"nothing was skipped: {idle}")
        self._reports.append(generation.report(notes))
        self.made += 1
        if idle and not self._warned:
            self._warned = True
            warnings.warn(f"{self.config.method} never acted in this run: {idle}", UnicpWarning, stacklevel=2)

    def _notes(self, generation: Generation) -> list[str]:
        """The notes of all denoisers; where these differ, with the denoiser's name."""
        under_way = {each.name: each.run.notes() for each in self._hooked if each.run is not None}
        every = {name: list(dict.fromkeys(notes)) for name, notes in {**generation.said, **under_way}.items()}
        said = {each.name: every[each.name] for each in self._hooked if every.get(each.name)}
        if len(said) < 2:
            return [note for notes in said.values() for note in notes]
        common = [note for note in next(iter(said.values())) if all(note in notes for notes in said.values())]
        return common + [f"{name}: {note}" for name, notes in said.items() for note in notes if note not in common]

    def _end_if_complete(self) -> None:
        """Close the video if its last step was seen. A video in progress is left alone: it may go on."""
        for each in self._hooked:
            if each.run is not None:
                each.run.settle()
        if self._generation is not None and self._generation.complete:
            for each in self._hooked:
                each.end()

    def _is_over(self) -> bool:
        """Whether the video in progress had its last call."""
        return all(each.is_over() for each in self._hooked)

    def _end(self) -> None:
        for each in self._hooked:
            each.end()

    def end(self) -> None:
        """The video in progress is over, however far it came: the next call of a denoiser begins another."""
        self._end()
        self._close()

    def warn_again(self) -> None:
        """Warn again if the next video skips nothing; otherwise a session warns once."""
        self._warned = False

    def report(self) -> SessionReport:
        """The report of the last video; for a video that is in progress or broke off, what was done so far.

        Raises:
            UnicpError: no video was begun yet.

        Warns:
            UnicpWarning: this is the report of an earlier video, as the pipeline has another denoiser by now, its
                denoiser was accelerated through another pipeline or got another ``forward``, or calls since were no
                sampling (training).
        """
        self._end_if_complete()
        if self._generation is not None:
            return self._generation.report(self._notes(self._generation))
        swapped = self._swapped() or self._taken() or next(filter(None, (h.passed_by() for h in self._hooked)), "")
        if not self._reports:
            raise UnicpError(f"there is no report yet: {swapped or 'generate a video first'}")
        if swapped:
            warnings.warn(f"this is the report of an earlier video: {swapped}", UnicpWarning, stacklevel=2)
        return self._reports[-1]

    def _swapped(self) -> str:
        """Says that a denoiser was replaced since it was accelerated, and what to do; empty if none was."""
        pipe = self._pipe()
        names = [n for n, own in self._denoisers.items() if original(getattr(pipe, n, own)) is not own]
        if pipe is None or not names:
            return ""
        return (
            f"{names[0]} of the pipeline is another module than the one that was accelerated, so that nothing is "
            "skipped; accelerate the pipeline again"
        )

    def _taken(self) -> str:
        """Says that a denoiser was accelerated through another pipeline since; empty if none was."""
        for session, names in _in_force(self._denoisers.values()).items():
            if session is not self and session.is_of_another(self._pipe()):
                return SHARED_NOTE.format(name=names[0])
        return ""

    def of(self, pipe: Any) -> bool:
        """Whether the session acts on this pipeline."""
        return pipe is not None and self._pipe() is pipe

    def is_of_another(self, pipe: Any) -> bool:
        """Whether the session acts on a pipeline that still exists and is another one than this."""
        return pipe is not None and self._pipe() is not None and not self.of(pipe)

    def leave_all_but(self, denoisers: Iterable[Any]) -> None:
        """Stop acting on every denoiser that is not one of these, as those were swapped out."""
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
        """Records of the video in progress so far. They suit a progress bar: some measurements may still be missing."""
        return list(self._generation.records) if self._generation is not None else []

    def cached_tensors(self) -> list[Any]:
        """The tensors that are kept at this moment; there are none between two videos."""
        return [tensor for each in self._hooked if each.run is not None for tensor in each.run.tensors()]

    def restore(self) -> None:
        """Remove everything of unicp from the denoisers. Doing it twice does no harm."""
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
        pipe_or_module: a diffusers pipeline, or its transformer alone. If a pipeline has two denoisers (Wan 2.2), both
            are accelerated, each with a state of its own. Pass the pipeline where you can: its scheduler tells how many
            steps there are and where a video begins.
        config: a config such as ``AdaCacheConfig()``, the name of a method (``"adacache"``), a :class:`Profile` or the
            path of one.
        spec: the structure of a model that is not built in. Without one, methods that look only at blocks take the list
            of blocks that holds most of the denoiser's parameters, and check at the first call that it is suitable.
        group: processes among which a model's tokens are divided (dimension 1 of its hidden states, evenly). It is only
            for models that are split by hand: a split by diffusers' ``enable_parallelism`` is found without it.
            Or processes that run one branch of guidance each: all then decide from what the branches measure together.
            Do not combine that with ``moreg``, which would treat one branch's frames as a continuation of the other's.

    Returns:
        The :class:`Session`. An earlier acceleration of the same denoisers by unicp is replaced; if this one is
        refused, the earlier one stays in force.

    Raises:
        UnicpError: the target or the config is none of these; the method looks into the blocks of a denoiser whose
            structure is not known; a profile is missing, damaged or of another model; the denoiser keeps keys from call
            to call, or another cache acts on it; its weights are sharded among processes that would decide apart.
    """
    denoisers, pipe = find_denoisers(pipe_or_module)
    resolved = resolve_config(config)
    acting = read(resolved)
    needs = make_policy(acting).needs()
    for denoiser in denoisers.values():
        check_denoiser(denoiser, pipe, resolved.method, needs, group)
    specs = {name: spec or _spec_of(denoiser, acting, needs) for name, denoiser in denoisers.items()}
    earlier = _in_force(denoisers.values())
    for session, names in earlier.items():
        if session.is_of_another(pipe):
            warnings.warn(SHARED_NOTE.format(name=names[0]), UnicpWarning, stacklevel=2)
    restore(pipe_or_module)
    try:
        return Session(denoisers, resolved, acting, specs, pipe, group)
    except BaseException:
        for session, names in earlier.items():
            session.put_back(names)
        raise


def _in_force(denoisers: Iterable[Any]) -> dict[Session, list[str]]:
    """The sessions that act on these denoisers, with their names for them."""
    found: dict[Session, list[str]] = {}
    for denoiser in denoisers:
        hook = hooks.find(denoiser, hooks.DENOISER_HOOK)
        known = _SESSIONS.get(hook.owner) if hook is not None else None
        session = known() if known is not None else None
        if session is not None:
            found.setdefault(session, []).append(hook.owner.name)
    return found


def _spec_of(denoiser: Any, config: Config, needs: Needs) -> ModelSpec | None:
    """The registered spec of a denoiser or, if the method needs one and none is registered, one found by its structure.

    Raises:
        UnicpError: the method needs a spec, and there is none.
    """
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
    """Remove everything of unicp from a pipeline or module, in whatever order other hooks came and went.

    Args:
        pipe_or_module: what was given to :func:`accelerate`, or its denoiser.

    Raises:
        UnicpError: it is neither a pipeline with a denoiser nor a module.
    """
    denoisers, pipe = find_denoisers(pipe_or_module)
    for session in {known() for known in _SESSIONS.values()}:
        if session is not None and session.of(pipe):
            session.leave_all_but(list(denoisers.values()))
    for denoiser in denoisers.values():
        hook = hooks.find(denoiser, hooks.DENOISER_HOOK)
        if hook is not None:
            hook.owner.remove()
