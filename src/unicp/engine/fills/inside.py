"""Which units of a denoiser act under a config, and with what of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import UnicpError
from ...policies.base import Needs
from ...profiles.measured import DenoiserProfile
from ...specs import ATTENTION_KINDS, ModelSpec, Unit
from ..slicing.attention import SlicedAttention, basis, choose_ranks
from ..slicing.maps import MapAttention
from .units import Units


def group(kind: str) -> str:
    """The kind of a unit as ``Needs.units`` names it."""
    return "attention" if kind in ATTENTION_KINDS else kind


def units_inside(
    config: Any,
    needs: Needs,
    denoiser: Any,
    spec: ModelSpec,
    measured: Sequence[int],
    profile: DenoiserProfile | None,
    eagerly: Callable[[Any, Any], Any],
) -> Units:
    """The units of a denoiser that act under a config.

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
    found = [unit for unit in spec.units(denoiser) if group(unit.kind) in needs.units]
    kinds = {unit.name: unit.kind for unit in found}
    # What the stack's policy measures has to be computed: a kept output would seem not to change.
    known = {"self_attention": ATTENTION_KINDS, "block": tuple(kinds.values())}
    watched = known.get(needs.metric or "", (needs.metric,))
    protected = [unit.name for unit in found if unit.block in measured and unit.kind in watched]
    feeds = {unit.name: unit.feeds for unit in spec.units(denoiser) if unit.feeds in kinds}
    # Filled without all that feeds it, a unit would pass over what is to be computed; and those of its own kind are
    # only filled with it, as nothing is kept of them.
    may_be = {name for name, kind in kinds.items() if name not in protected and config.threshold(kind) > 0}
    never = {target for name, target in feeds.items() if name not in may_be}
    own = {name for name, target in feeds.items() if kinds.get(name) == kinds[target]}
    protected += [name for name in kinds if name in never or (name in own and feeds[name] in never)]
    together = config.windows == "shared" and not needs.map_bytes
    feeds = {name: target for name, target in feeds.items() if target not in never}
    unkept = never | {name for name in feeds if together or name in own}
    units = Units(
        {unit.name: unit.module for unit in found},
        kinds,
        protected,
        eagerly,
        feeds=feeds,
        unkept=unkept,
        refresh=config.refreshes,
        order=needs.unit_order,
        packed=needs.unit_packed,
        damping=needs.unit_damping,
        measure=needs.unit_changes,
        map_bytes=needs.map_bytes,
        cache_bytes=needs.cache_bytes,
    )
    if profile is not None:
        profile.check_units(kinds)
        slicers, sliced, unknown = _slicers(config, profile, found) if config.pcas else ({}, {}, [])
        units.slicers, units.errors = slicers, profile.errors(config.statistic, sliced, config.fill)
        if unknown:
            units.notes.append(f"left unsliced, as their attention processor is not known: {', '.join(unknown)}")
    if needs.map_bytes:
        mapped = [unit for unit in found if unit.kind in ATTENTION_KINDS and unit.name not in protected]
        mappers = {unit.name: MapAttention(unit.module, units.allow) for unit in mapped}
        units.mappers = {name: mapper for name, mapper in mappers.items() if mapper.works}
    return units


def _slicers(
    config: Any, profile: DenoiserProfile, units: Sequence[Unit]
) -> tuple[Mapping[str, SlicedAttention], dict[str, float], list[str]]:
    """The sliced twins of units, the errors of their slicing, and the attention processors that cannot be sliced."""
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
    return slicers, sliced, sorted(unknown)
