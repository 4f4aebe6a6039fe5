"""Acting inside a computed step: a denoiser's units, and what a profile says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnicpError
from ...policies.base import Decision, Needs, Policy, Step
from ...profiles import DenoiserProfile
from ...specs import ATTENTION_KINDS, ModelSpec, Unit
from ..report import readable_bytes
from ..slicing.attention import SlicedAttention, basis, choose_ranks
from ..slicing.maps import MapAttention
from .units import UnitCall, UnitFill, Units


def group(kind: str) -> str:
    """The kind of a unit as ``Needs.units`` names it."""
    return "attention" if kind in ATTENTION_KINDS else kind


class Inside:
    """The units of one denoiser under one config.

    Args:
        config: has the fields of ``UniCPConfig``.
        needs: what its policy needs.
        denoiser, spec: the transformer and its structure.
        measured: positions of the blocks in which the policy of whole steps measures.
        profile: what was measured of this denoiser, if the config has a profile.
        eagerly: given what would run a module, and the module: what runs it uncompiled.

    Raises:
        UnicpError: the profile says nothing of a unit, or is damaged.
    """

    def __init__(
        self,
        config: Any,
        needs: Needs,
        denoiser: Any,
        spec: ModelSpec,
        measured: Sequence[int],
        profile: DenoiserProfile | None,
        eagerly: Callable[[Any, Any], Any],
    ) -> None:
        self.notes: list[str] = []
        units = [unit for unit in spec.units(denoiser) if group(unit.kind) in needs.units]
        self._kinds = {unit.name: unit.kind for unit in units}
        # What the stack's policy measures has to be computed: a kept output would seem not to change.
        kinds = {"self_attention": ATTENTION_KINDS, "block": tuple(self._kinds.values())}
        watched = kinds.get(needs.metric or "", (needs.metric,))
        self._protected = [unit.name for unit in units if unit.block in measured and unit.kind in watched]
        self._errors: Any = None
        slicers: dict[str, SlicedAttention] = {}
        if profile is not None:
            profile.check_units(self._kinds)
            slicers, sliced = self._slicers(config, profile, units) if config.pcas else ({}, {})
            self._errors = profile.errors(config.statistic, sliced)
        mappers = {}
        if needs.map_bytes:
            mappers = {
                unit.name: MapAttention(unit.module, self._allow)
                for unit in units
                if unit.kind in ATTENTION_KINDS and unit.name not in self._protected
            }
            mappers = {name: mapper for name, mapper in mappers.items() if mapper.works}
        self.units = Units(
            units,
            slicers,
            mappers,
            eagerly,
            keep_slices=config.dws == "delta",
            refresh=config.refreshes,
            measure=needs.unit_changes,
        )
        self.units.map_bytes = needs.map_bytes
        self.ways: dict[str, list[str]] = {}  # how each unit ran in the last call
        self._limit = needs.cache_bytes
        self.units.limited = self._limit is not None

    def _slicers(
        self, config: Any, profile: DenoiserProfile, units: Sequence[Unit]
    ) -> tuple[dict[str, SlicedAttention], dict[str, float]]:
        slicers, sliced, unknown = {}, {}, set()
        for unit in units:
            moments = profile.moments(unit.name)
            if moments is None:
                continue
            moment_qk, moment_v = moments
            heads = getattr(unit.module, "heads", None)
            if heads is not None and moment_qk.shape[0] != heads:
                raise UnicpError(
                    f"the profile's calibration of {profile.name!r} is damaged: {unit.name!r} has {heads} heads, the "
                    f"profile has {moment_qk.shape[0]}; make it again"
                )
            table = profile.slicing(unit.name)
            ranks = choose_ranks(table, moment_qk.shape[-1], config.delta_prune)
            if ranks is None:
                continue
            fold = unit.described.plain_values
            slicer = SlicedAttention(unit.module, basis(moment_qk, ranks.qk), basis(moment_v, ranks.v), fold)
            if not slicer.works:
                unknown.add(type(unit.module.processor).__name__)
                continue
            slicers[unit.name], sliced[unit.name] = slicer, table[ranks.qk][0]
        if unknown:
            self.notes.append(f"left unsliced, as their attention processor is not known: {', '.join(sorted(unknown))}")
        return slicers, sliced

    def _allow(self, size: int) -> bool:
        allowed = self.units.allow(size)
        note = f"attention maps are kept up to map_bytes={self.units.map_bytes}; the others would not fit"
        if not allowed and note not in self.notes:
            self.notes.append(note)
        return allowed

    @property
    def choosing(self) -> bool:
        """The units whose outputs are kept are yet to be chosen."""
        return self.units.limited and not self.units.chosen

    def choose(self, costs: Mapping[str, int], branches: int) -> None:
        """Keep the outputs that save the most operations for their bytes, as many as may be kept.

        Args:
            costs: operations of each unit in a call.
            branches: guidance branches, each of which keeps outputs of its own.

        Raises:
            UnicpError: not one fits.
        """
        assert self._limit is not None
        sizes = {name: size * branches for name, size in self.units.sizes.items() if size}
        order = sorted(sizes, key=lambda name: costs.get(name, 0) / sizes[name], reverse=True)
        chosen, left = [], self._limit
        for name in order:
            if sizes[name] <= left:
                chosen.append(name)
                left -= sizes[name]
        if not chosen:
            least = min(sizes.values(), default=0)
            raise UnicpError(
                f"max_cache_bytes={self._limit}: the smallest output of a unit takes {least} bytes in {branches} "
                "guidance branches; give more, or use a method that keeps whole outputs (BudgetConfig)"
            )
        self.units.chosen = frozenset(chosen)
        self.notes = [note for note in self.notes if not note.startswith("max_cache_bytes")]
        if len(chosen) < len(sizes):
            kinds = Counter(self._kinds[name] for name in chosen)
            listed = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in kinds.items())
            used = sum(sizes[name] for name in chosen)
            self.notes.append(
                f"max_cache_bytes: {len(chosen)} of {len(sizes)} units are kept ({listed}; {readable_bytes(used)}), "
                "those that save the most operations for their bytes; the others are computed"
            )

    def introduce(self, policy: Policy) -> None:
        """Tell a new policy what there is to decide on."""
        policy.attach(self._kinds, self._protected, self._errors)

    def spread(self, group: Any) -> None:
        """The tokens are spread over these processes, or over none (``None``).

        Raises:
            UnicpError: attention is sliced or runs on old maps, which is for whole sequences only.
        """
        if group is not None and (self.units.slicers or self.units.mappers):
            raise UnicpError(
                "attention of a context-parallel model can be neither sliced nor run on old maps; use pcas=False and "
                "map_level=False"
            )
        self.units.group = group

    def begin(
        self,
        step: Step,
        decision: Decision,
        batch: int,
        measuring: bool,
        fills: Mapping[str, dict[str, UnitFill]],
        branch: str,
    ) -> None:
        """Begin a call of the denoiser, given what is kept of each guidance branch."""

        def held() -> int:
            maps = [m for units in fills.values() for fill in units.values() for m in fill.maps]
            return sum(m.untyped_storage().nbytes() for m in maps)

        self.units.call = UnitCall(step, batch, decision.units, decision.weights, measuring, fills[branch], held)

    def finish(self) -> tuple[dict[str, str], dict[str, tuple[int, Any]]]:
        """End the call. What each unit did, if not all were computed, and what was measured."""
        call, self.units.call = self.units.call, None
        assert call is not None
        self.ways = call.ways
        acted = any(action != "compute" for action in call.done.values())
        return dict(call.done) if acted else {}, self.units.changes(call)
