"""Descriptions of denoisers: structure only, no behaviour.

There is one small file per family, which calls :func:`register_spec`. Policies that act on the denoiser's whole output
need no spec. Those that act on its blocks do, though for whole blocks ``discovery`` may find one.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnicpError, unknown

TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "time")
"""Names of the timestep argument, likeliest first."""

LAYOUTS = ("tokens", "spatial", "temporal")

ATTENTION_KINDS = ("self_attention", "spatial_attention", "temporal_attention", "joint_attention")
"""Attention among video tokens: all of them, those of one frame, those at one place in all frames, or all of them
together with the text's tokens."""
UNIT_KINDS = (*ATTENTION_KINDS, "cross_attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One list of transformer blocks.

    Attributes:
        path: attribute path of the ``nn.ModuleList`` in the denoiser.
        layout: shape of the hidden states that the blocks see. With B samples, F token frames and S tokens per frame:
            ``"tokens"`` (B, F*S, C), ``"spatial"`` (B*F, S, C), ``"temporal"`` (B*S, F, C).
        streams: names of the hidden-state arguments (the video's first) that a block takes, in the order in which it
            returns them. ``("hidden_states",)`` describes a block that returns one tensor.
        residuals: where in a block its sub-layers begin, in order: ``{"self_attention": None, "mlp": "norm3"}``
            says that self-attention's residual is added between the block's input and the input of its submodule
            ``norm3``, and the MLP's from there to the block's output.
        measured: whether the metric of a policy may be taken here. In models with separate spatial and temporal
            attention it is taken in the temporal blocks (AdaCache's reference does so).
        units: submodules of a block whose output may be kept for later steps while the rest of the block runs, with
            their kind (one of :data:`UNIT_KINDS`), in the order in which they run: ``{"attn1": "self_attention"}``.
            A submodule that is ``None`` in some block (the text's MLP in a last block) is left out there.
        feeds: units whose output goes nowhere but into another unit, which comes after them: ``{"attn": "proj_out"}``.
            Where that one is filled, they do not run at all.
        stacked: whether the list is part of the stack that is skipped as a whole. A control branch beside it is not:
            its blocks run whenever the denoiser is called, though the outputs of their units may be kept.
        plain_values: whether the attention processors use values as ``to_v`` returns them and infer the head size from
            them, so that a basis of the values may be folded into the weights around them.
    """

    path: str
    layout: str = "tokens"
    streams: tuple[str, ...] = ("hidden_states",)
    residuals: Mapping[str, str | None] = field(default_factory=lambda: {"self_attention": None})
    measured: bool = True
    units: Mapping[str, str] = field(default_factory=dict)
    feeds: Mapping[str, str] = field(default_factory=dict)
    stacked: bool = True
    plain_values: bool = False


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An attention module or an MLP inside a block.

    Attributes:
        name: its module path in the denoiser.
        kind: one of :data:`UNIT_KINDS`.
        module: the module itself.
        block: position of its block in the stack.
        described: the list that its block belongs to.
        feeds: name of the unit that alone gets its output (``BlockList.feeds``); empty if there is none.
    """

    name: str
    kind: str
    module: Any
    block: int
    described: BlockList
    feeds: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The structure of a family of denoisers.

    Attributes:
        family: short name for tables and messages.
        classes: names of the transformer classes that it describes.
        block_lists: every list of blocks of the stack, in the order of their first blocks' execution.
        interleaved: the lists alternate (block 0 of each, then block 1 of each) instead of running one after another.
        frames: function that returns the number of token frames of a call, given the denoiser and its arguments by
            name.
        timestep: name of the argument that carries the timestep.
        hidden: name of the argument that carries the latents, samples first.
        rising_timestep: whether the timestep rises as the noise falls (Mochi).
        kept: how many of the last block's streams, from the first, the model uses afterwards; ``None`` means all. The
            others are not filled.

    Register your own with :func:`register_spec`, or pass it to ``accelerate(..., spec=...)``.
    """

    family: str
    classes: tuple[str, ...]
    block_lists: tuple[BlockList, ...]
    frames: Callable[[Any, Mapping[str, Any]], int]
    interleaved: bool = False
    timestep: str = "timestep"
    hidden: str = "hidden_states"
    rising_timestep: bool = False
    kept: int | None = None

    def blocks(self, denoiser: Any) -> list[tuple[str, Any, BlockList]]:
        """All blocks in order of execution: (name, module, its list).

        Raises:
            UnicpError: the denoiser has no such list of blocks.
        """
        lists = []
        for described in self.block_lists:
            try:
                modules = list(denoiser.get_submodule(described.path))
            except (AttributeError, TypeError):
                raise UnicpError(
                    f"{type(denoiser).__name__} has no list of blocks named {described.path!r}, as the spec of the "
                    f"family {self.family!r} says; pass a fitting spec= to accelerate"
                ) from None
            lists.append([(f"{described.path}.{i}", module, described) for i, module in enumerate(modules)])
        if self.interleaved:
            return [block for group in zip(*lists, strict=True) for block in group]
        return [block for group in lists for block in group]

    def stack(self, denoiser: Any) -> list[tuple[str, Any, BlockList]]:
        """The blocks that are skipped together, as from :meth:`blocks`."""
        return [block for block in self.blocks(denoiser) if block[2].stacked]

    def units(self, denoiser: Any) -> list[Unit]:
        """Every unit of every block, in order of execution."""
        return [
            Unit(
                name=f"{name}.{path}",
                kind=kind,
                module=block.get_submodule(path),
                block=i,
                described=described,
                feeds=f"{name}.{described.feeds[path]}" if path in described.feeds else "",
            )
            for i, (name, block, described) in enumerate(self.blocks(denoiser))
            for path, kind in described.units.items()
            if getattr(block, path, path) is not None
        ]


_SPECS: dict[str, ModelSpec] = {}


def register_spec(spec: ModelSpec) -> ModelSpec:
    """Make a spec known for all denoisers of its classes; the last one registered for a class counts.

    Returns:
        The spec.

    Raises:
        UnicpError: it has an unknown layout or kind of unit, or a unit feeds what is none.
    """
    for described in spec.block_lists:
        if described.layout not in LAYOUTS:
            raise UnicpError(f"layout of {described.path!r} must be one of {', '.join(LAYOUTS)}")
        for kind in described.units.values():
            if kind not in UNIT_KINDS:
                raise unknown(f"kind of unit in {described.path!r}", kind, UNIT_KINDS)
        for name in (*described.feeds, *described.feeds.values()):
            if name not in described.units:
                raise unknown(f"unit in feeds of {described.path!r}", name, tuple(described.units))
    for name in spec.classes:
        _SPECS[name] = spec
    return spec


def known_specs() -> dict[str, ModelSpec]:
    """Every registered spec by transformer class name. All modules of this package are imported for it."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(_SPECS)


def tested() -> dict[str, dict[str, Any]]:
    """What the contract is run for, by transformer class: ``pipelines``, ``cases`` and whether any were ``sliced``.

    ``python -m tests.coverage`` writes it from the tests' own lists, and a test compares the two.
    """
    path = importlib.resources.files(__name__) / "tested.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return found


def find_spec(denoiser: Any) -> ModelSpec | None:
    """The spec of a denoiser's class or of one of its base classes, or ``None``."""
    known = known_specs()
    for kind in type(denoiser).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    return None
