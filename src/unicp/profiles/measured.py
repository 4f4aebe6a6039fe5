"""The calibration of one denoiser in a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnicpError
from ..policies.unit_errors import UnitErrors
from .identity import fingerprint

UNIT_TENSORS = ("cache_mean", "cache_max", "forecast_mean", "forecast_max", "moment_qk", "moment_v", "slicing")
TABLES = {"reuse": "cache", "forecast": "forecast"}
"""What the errors of each fill are called."""


def _plain(text: Any) -> str:
    """A text from a profile, made fit for one line."""
    return str(text)[:40] if str(text).isprintable() else repr(text)[:40]


@dataclass(frozen=True, kw_only=True)
class DenoiserProfile:
    """The part of a profile that belongs to one denoiser.

    Attributes:
        name: the denoiser's name in the pipeline.
        steps: number of denoising steps of the calibration's runs.
        tensors: measurements. For a unit ``u``, ``u/cache_mean`` and ``u/cache_max`` (N, K) are the change of its
            output from step t to t + k; ``u/forecast_mean`` and ``u/forecast_max`` (N, K) are the error of its forecast
            from steps t - 1 and t; ``u/moment_qk`` and ``u/moment_v`` (H, d, d) are second moments; ``u/slicing``
            (R, 3) is the change of its output at each rank when queries, keys and values, only queries and keys, or
            only values are sliced. ``stack/cache_mean`` and ``stack/cache_max`` (N, K) are the change of the residual
            of all blocks; ``metric`` (N,) and ``motion`` (N,) are AdaCache's change per step and MoReg's motion score.
        metadata: ``class``, ``fingerprint``, ``sigmas``, ``units`` (kind by name), ``ranks``.
    """

    name: str
    steps: int
    tensors: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def sigmas(self) -> list[float]:
        return [float(s) for s in self.metadata["sigmas"]]

    @property
    def units(self) -> dict[str, str]:
        return dict(self.metadata.get("units", {}))

    def damage(self) -> str:
        """What is wrong with names, numbers or shapes; empty if nothing is."""
        made, sigmas, units = self.metadata.get("class"), self.metadata.get("sigmas"), self.metadata.get("units", {})
        if not isinstance(made, str) or not isinstance(self.metadata.get("fingerprint"), str):
            return "it does not say of which model it is"
        numbers = isinstance(sigmas, list) and all(type(s) in (int, float) and math.isfinite(s) for s in sigmas)
        if not numbers or type(self.steps) is not int or not 0 <= self.steps <= 10_000:
            return "'sigmas' must be numbers, 'steps' one up to 10000"
        if not isinstance(units, dict) or not all(isinstance(kind, str) for kind in units.values()):
            return "'units' must name the kind of each unit"
        for unit in units:
            shapes = {name: self._shape(f"{unit}/{name}") for name in UNIT_TENSORS}
            mean, most, line, line_most, qk, v, slicing = shapes.values()
            if mean is None or len(mean) != 2 or mean != most:
                return f"the changes of {unit!r:.80} have the shapes {mean} and {most}"
            if line != line_most or (line is not None and line != mean):  # earlier profiles have none
                return f"the forecast errors of {unit!r:.80} have the shapes {line} and {line_most}"
            if qk is None and v is None:
                continue
            ranks = self.metadata["ranks"][unit]
            if qk is None or len(qk) != 3 or not qk[1] == qk[2] > 0 or qk != v or slicing != (len(ranks), 3):
                return f"the moments and slicing errors of {unit!r:.80} have the shapes {qk}, {v} and {slicing}"
            if not all(bool(self.tensors[f"{unit}/{name}"].isfinite().all()) for name in UNIT_TENSORS[4:6]):
                return f"the moments of {unit!r:.80} are not finite"
            if not all(type(rank) is int and 0 < rank <= qk[1] for rank in ranks):
                return f"the ranks of {unit!r:.80} must be whole numbers up to {qk[1]}"
        return ""

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a floating-point tensor; ``None`` if it is missing or of another type."""
        tensor = self.tensors.get(name)
        return tuple(tensor.shape) if tensor is not None and tensor.is_floating_point() else None

    def check_model(self, denoiser: Any) -> None:
        """Refuse a denoiser that the profile was not made on.

        Raises:
            UnicpError: its class, sizes or config differ.
        """
        made, given = self.metadata["class"], type(denoiser).__name__
        if made != given:
            raise UnicpError(
                f"the profile was made on a {_plain(made)}, this is a {given}; make it again on this model"
            )
        theirs, ours = self.metadata["fingerprint"], fingerprint(denoiser)
        if theirs != ours:
            raise UnicpError(
                f"the profile was made on another {made} (fingerprint {_plain(theirs)}, this one has {ours}); "
                "make it again on this model"
            )

    def check_units(self, units: Mapping[str, str]) -> None:
        """Refuse units that were not calibrated.

        Raises:
            UnicpError: nothing was measured on one of them.
        """
        missing = [unit for unit in units if unit not in self.units]
        if missing:
            raise UnicpError(
                f"the profile holds no calibration of {missing[0]!r} and {len(missing) - 1} more; make one with: "
                "unicp calibrate"
            )

    def errors(self, statistic: str, sliced: Mapping[str, float], fill: str) -> UnitErrors:
        """The plain numbers a policy decides by.

        Args:
            statistic: ``"mean"`` or ``"max"`` over prompts and branches.
            sliced: errors of slicing, by unit.
            fill: ``"reuse"`` or ``"forecast"``: whose errors.

        Raises:
            UnicpError: they were not measured.
        """
        table = TABLES[fill]
        if any(f"{unit}/{table}_{statistic}" not in self.tensors for unit in self.units):
            raise UnicpError(
                "the profile was made before errors of forecasts were measured; calibrate again, or take fill='reuse'"
            )
        cache = {unit: self.tensors[f"{unit}/{table}_{statistic}"].tolist() for unit in self.units}
        return UnitErrors(sigmas=self.sigmas, steps=self.steps, cache=cache, sliced=dict(sliced))

    def moments(self, unit: str) -> tuple[Any, Any] | None:
        """Second moments (queries and keys, values) of a unit, or ``None`` where none were measured."""
        if f"{unit}/moment_qk" not in self.tensors:
            return None
        return self.tensors[f"{unit}/moment_qk"], self.tensors[f"{unit}/moment_v"]

    def slicing(self, unit: str) -> dict[int, tuple[float, float, float]]:
        """Slicing errors by rank: everything sliced, only queries and keys, only values."""
        rows = self.tensors[f"{unit}/slicing"].tolist()
        ranks = self.metadata["ranks"][unit]
        return {int(rank): (float(row[0]), float(row[1]), float(row[2])) for rank, row in zip(ranks, rows, strict=True)}
