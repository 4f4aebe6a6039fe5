"""What was done: a record a denoiser call, a report a generated video."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

UNITS_DONE = {
    "compute": "computed",
    "reuse": "reused",
    "map": "run on an old map",
    "slice": "sliced",
    "forecast": "forecast",
}
"""How a report says what was done with a module."""


@dataclass(kw_only=True)
class StepRecord:
    """One denoiser call.

    Attributes:
        index: denoising step, from 0.
        sigma: noise level at that step.
        branch: guidance branch, as the pipeline names it (``"cond"``, ``"uncond"``, ...), or ``"call 1"``, ``"call 2"``
            by the order of calls where it names none.
        action: ``"compute"``, ``"reuse"``, ``"forecast"``, ``"leap"`` (the solver had gone beyond it) or ``"partial"``.
        metric: measured relative change since the last computed step, before division by the rate; ``None`` where
            nothing was measured.
        motion: motion score, where it was asked for.
        units: action of each unit where the call was partial.
        denoiser: name of the denoiser in its pipeline.
        operations: floating-point operations of the denoiser that ran in the call.
    """

    index: int
    sigma: float
    branch: str
    action: str
    metric: float | None = None
    motion: float | None = None
    units: dict[str, str] = field(default_factory=dict)
    denoiser: str = "transformer"
    operations: int = 0


@dataclass(frozen=True, kw_only=True)
class SessionReport:
    """What was done for one video.

    Attributes:
        method: name of the method.
        steps: records in the order of the calls.
        computed_fraction: share of the denoiser's floating-point operations that ran, from 0 to 1, attention included,
            at the shapes of this video (:mod:`unicp.tensors.flops`). What sliced attention takes counts as that.
        cache_bytes: the most that was kept for later steps at any time.
        sliced_bytes: memory of sliced weights.
        complete: whether the last denoising step was seen (or nobody says how many there are).
        seconds: from the beginning of the first denoiser call to the end of the last, on the host's clock. On a GPU
            the last kernels may still be running.
        notes: what a method could not do, and why.
        operations: floating-point operations of the denoiser that ran.
        all_operations: those of the same calls, unaccelerated.
    """

    method: str
    steps: tuple[StepRecord, ...]
    computed_fraction: float
    cache_bytes: int
    sliced_bytes: int
    seconds: float
    complete: bool = True
    notes: tuple[str, ...] = ()
    operations: int = 0
    all_operations: int = 0

    @property
    def estimated_speedup(self) -> float:
        """Speed-up of the denoiser if time followed its operations: an upper bound, not a measurement."""
        return 1 / self.computed_fraction if self.computed_fraction else float("inf")

    @property
    def computed_steps(self) -> int:
        """Denoising steps in which at least one branch was computed."""
        return len({(r.denoiser, r.index) for r in self.steps if r.action in ("compute", "partial")})

    @property
    def count(self) -> int:
        """Denoising steps seen."""
        return len({(r.denoiser, r.index) for r in self.steps})

    def timeline(self) -> dict[str, str]:
        """One line a branch, one character a step.

        ``#`` computed, ``+`` partial, ``~`` forecast, ``.`` reused, ``-`` leapt over.
        """
        signs = {"compute": "#", "partial": "+", "forecast": "~", "reuse": ".", "leap": "-"}
        lines: dict[str, str] = {}
        for record in self.steps:
            lines[record.branch] = lines.get(record.branch, "") + signs[record.action]
        return lines

    def unit_counts(self) -> dict[str, int]:
        """How often modules did what, over the calls in which some of them did not run in full."""
        return dict(Counter(action for record in self.steps for action in record.units.values()).most_common())

    def unit_timeline(self, branch: str | None = None) -> dict[str, str]:
        """What each module did: one line a module, one character a call of a guidance branch (the first by default).

        ``#`` computed in full, ``m`` on the kept attention map, ``s`` sliced, ``.`` kept output, ``~`` forecast
        from kept outputs, blank where the whole call was filled.
        """
        branch = branch or next((record.branch for record in self.steps), None)
        calls = [record for record in self.steps if record.branch == branch]
        names = list(dict.fromkeys(name for record in calls for name in record.units))
        signs = {"compute": "#", "map": "m", "slice": "s", "reuse": ".", "forecast": "~"}
        return {
            name: "".join(
                signs[record.units.get(name, "compute")] if record.action in ("compute", "partial") else " "
                for record in calls
            )
            for name in names
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "steps"}
        values["computed_steps"], values["step_count"] = self.computed_steps, self.count
        values["estimated_speedup"] = self.estimated_speedup if self.steps else None
        values["steps"] = [dataclasses.asdict(record) for record in self.steps]
        return values

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.computed_steps} of {self.count} denoising steps computed "
            f"({self.computed_fraction:.0%} of the denoiser's operations)",
            f"  in {self.seconds:.1f} s; {readable_bytes(self.cache_bytes)} kept at most",
        ]
        if not self.complete:
            lines.append("  the run ended before its last step")
        timeline = self.timeline()
        width = max((len(branch) for branch in timeline), default=0)
        for branch, line in timeline.items():
            # 80 columns: long runs wrap.
            pieces = [line[i : i + 60] for i in range(0, len(line), 60)]
            lines += [f"  {branch if i == 0 else '':<{width}}  {piece}" for i, piece in enumerate(pieces)]
        lines.append("  # computed   + partial   ~ forecast   . reused   - leapt over")
        done = self.unit_counts()
        if done:
            said = ", ".join(f"{count} {UNITS_DONE[action]}" for action, count in done.items())
            lines.append(f"  modules in partial calls: {said}")
        for note in self.notes:
            lines += textwrap.wrap(note, 78, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)


def readable_bytes(count: float) -> str:
    """Bytes as a person reads them.

    >>> readable_bytes(3 * 2**20)
    '3.0 MiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _storage(tensors: Iterable[Any]) -> int:
    """Bytes behind these tensors; shared ones count once."""
    # By the storage itself: on a device without memory (meta) all addresses are the same.
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Generation:
    """Collects what happens while one video is generated.

    Attributes:
        denoisers: names of those that took part.
        said: what policies had to say on each denoiser whose run is over.
        idle: why each of them may have computed every step.
    """

    def __init__(self, method: str) -> None:
        self.method = method
        self.said: dict[str, list[str]] = {}
        self.idle: dict[str, str] = {}
        self.records: list[StepRecord] = []
        self.denoisers: set[str] = set()
        self.complete = False
        self._all = 0
        self._began: float | None = None
        self._ended = 0.0
        self._held: dict[str, int] = {}
        self._most = 0
        self._sliced: dict[str, int] = {}

    def add(self, record: StepRecord, operations: int, began: float) -> None:
        """Note a call, the operations it would have taken in full, and when it began."""
        self.records.append(record)
        self._all += operations
        self._began = began if self._began is None else self._began
        self._ended = time.perf_counter()

    def hold(self, denoiser: str, tensors: Iterable[Any]) -> None:
        """Note what a denoiser keeps now; the most that all keep together counts."""
        self._held[denoiser] = _storage(tensors)
        self._most = max(self._most, sum(self._held.values()))

    def sliced(self, denoiser: str, tensors: Iterable[Any]) -> None:
        """Note the memory of a denoiser's sliced weights."""
        self._sliced[denoiser] = _storage(tensors)

    @property
    def acted(self) -> bool:
        return any(record.action != "compute" for record in self.records)

    def _fraction(self, ran: int) -> float:
        if self._all:
            return ran / self._all
        # Of a denoiser without any matrix product, a call counts for as much as another.
        computed = sum(record.action in ("compute", "partial") for record in self.records)
        return computed / len(self.records) if self.records else 0.0

    def report(self, notes: Iterable[str] = ()) -> SessionReport:
        ran = sum(record.operations for record in self.records)
        return SessionReport(
            method=self.method,
            steps=tuple(dataclasses.replace(record) for record in self.records),
            computed_fraction=self._fraction(ran),
            cache_bytes=self._most,
            sliced_bytes=sum(self._sliced.values()),
            seconds=self._ended - self._began if self._began is not None else 0.0,
            complete=self.complete,
            notes=tuple(notes),
            operations=ran,
            all_operations=self._all,
        )
