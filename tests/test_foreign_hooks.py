"""Others' hooks before and after ours, removed in any order: theirs go on working, ours too, and results are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading

import unicp
from tests.contract import OTHERS, actions, case, config_on, covering, fresh, plain, quietly, traces
from tests.family import OLDER
from tests.tiny import FAMILIES

WAN = FAMILIES["wan"]
NAMES = ("adacache-residual", "schedule-linear")


@dataclass
class Foreign:
    """A hook of somebody else: how it is put on and taken off, and how often it ran."""

    put: Callable[[torch.nn.Module], None]
    take: Callable[[torch.nn.Module], None]
    calls: list[int] = field(default_factory=list)


def _diffusers(replaces: bool, name: str = "foreign") -> Foreign:
    class Around(ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            foreign.calls.append(1)
            return args, kwargs

    class Replacing(ModelHook):
        def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            foreign.calls.append(1)
            return self.fn_ref.original_forward(*args, **kwargs)

    foreign = Foreign(
        put=lambda module: HookRegistry.check_if_exists_or_initialize(module).register_hook(
            Replacing() if replaces else Around(), name
        ),
        take=lambda module: module._diffusers_hook.remove_hook(name, recurse=False),
    )
    return foreign


def _accelerate() -> Foreign:
    class Hook(AccelerateHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            foreign.calls.append(1)
            return args, kwargs

    foreign = Foreign(put=lambda module: add_hook_to_module(module, Hook()), take=remove_hook_from_module)
    return foreign


KINDS: dict[str, Callable[[], Foreign]] = {
    "diffusers-around": lambda: _diffusers(replaces=False),
    "diffusers-replacing": lambda: _diffusers(replaces=True),
    "accelerate": _accelerate,
}
PLACES: dict[str, Callable[[Any], torch.nn.Module]] = {
    "denoiser": lambda transformer: transformer,
    "block": lambda transformer: transformer.blocks[1],
}


def _check(pipe: Any, session: unicp.Session | None, name: str, foreign: Foreign | None) -> None:
    """One run: the result is that of the configs in force, and the foreign hook runs as it should."""
    if foreign is not None:
        foreign.calls.clear()
    latents = WAN.generate(pipe)
    if session is None:
        assert torch.equal(latents, plain("wan"))
    else:
        expected = fresh("wan", name)
        assert torch.equal(latents, expected[0])
        assert actions(session.report()) == expected[1]
    if foreign is not None:
        assert 0 < len(foreign.calls) <= 20


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])
@pytest.mark.parametrize("ours_off_first", [True, False], ids=["ours-off-first", "theirs-off-first"])
@pytest.mark.parametrize(("kind", "place", "name"), covering(KINDS, PLACES, ["adacache-residual", "schedule-linear"]))
def test_one_foreign_hook(name: str, kind: str, place: str, ours_off_first: bool, ours_first: bool) -> None:
    pipe, foreign = WAN.build(), KINDS[kind]()
    module = PLACES[place](pipe.transformer)
    before = traces(pipe.transformer)
    if ours_first:
        session = unicp.accelerate(pipe, case(name).config)
        foreign.put(module)
    else:
        foreign.put(module)
        session = unicp.accelerate(pipe, case(name).config)
    _check(pipe, session, name, foreign)
    if ours_off_first:
        unicp.restore(pipe)
        _check(pipe, None, name, foreign)
        foreign.take(module)
        _check(pipe, None, name, None)
    else:
        foreign.take(module)
        _check(pipe, session, name, None)
        unicp.restore(pipe)
        _check(pipe, None, name, None)
    after = traces(pipe.transformer)
    assert [key for key in after if "registry" in key and after[key]] == []
    # A foreign hook puts the bound method back as an attribute; ours never stays.
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {key for key in before if key.endswith((".forward", ".attributes"))}
    for key in changed:
        if key.endswith(".forward"):
            assert after[key] is None or after[key].__func__ is type(module).forward


@pytest.mark.parametrize("order", list(itertools.permutations(["ours", "inner", "outer"])), ids="-".join)
@pytest.mark.parametrize("name", NAMES)
def test_between_two_foreign_hooks(name: str, order: tuple[str, ...]) -> None:
    """Ours in the middle of two that replace the forward, taken off in every order.

    diffusers itself switches an outer foreign hook off when the next inner *foreign* one is removed; with ours in
    between, that cannot happen to ours.
    """
    pipe = WAN.build()
    inner, outer = _diffusers(replaces=True, name="inner"), _diffusers(replaces=True, name="outer")
    inner.put(pipe.transformer)
    session: unicp.Session | None = unicp.accelerate(pipe, case(name).config)
    outer.put(pipe.transformer)
    on = {"inner": inner, "outer": outer}
    for step in order:
        if step == "ours":
            unicp.restore(pipe)
            session = None
        else:
            on.pop(step).take(pipe.transformer)
        for foreign in (inner, outer):
            foreign.calls.clear()
        _check(pipe, session, name, None)
        if session is not None or "inner" not in order[: order.index(step) + 1]:
            # (with ours gone, removing "inner" is a matter between diffusers and "outer")
            assert [key for key, foreign in (("inner", inner), ("outer", outer)) if foreign.calls] == list(on)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_around_a_diffusers_hook_around_ours(name: str) -> None:
    pipe, theirs, around = WAN.build(), _diffusers(replaces=True), _accelerate()
    session = unicp.accelerate(pipe, case(name).config)
    theirs.put(pipe.transformer)
    around.put(pipe.transformer)
    _check(pipe, session, name, around)
    unicp.restore(pipe)
    _check(pipe, None, name, around)
    assert theirs.calls
    # And again, on the inside.
    session = unicp.accelerate(pipe, case(name).config)
    _check(pipe, session, name, around)
    remove_hook_from_module(pipe.transformer)
    _check(pipe, session, name, theirs)
    unicp.restore(pipe)
    _check(pipe, None, name, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_offloading_takes_its_hooks_off_and_puts_them_on_again(name: str) -> None:
    """``enable_model_cpu_offload`` does so after every run; unicp stays in force."""
    pipe, foreign = WAN.build(), _accelerate()
    foreign.put(pipe.transformer)
    session = unicp.accelerate(pipe, case(name).config)
    for _ in range(2):
        _check(pipe, session, name, foreign)
        remove_hook_from_module(pipe.transformer, recurse=True)
        foreign.put(pipe.transformer)
    assert len(session.reports) == 2
    unicp.restore(pipe)
    _check(pipe, None, name, foreign)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_foreign_hook_that_changes_the_output(name: str, ours_first: bool) -> None:
    """What it does is done at every call if it stands outside, and at every computed one if it stands inside."""

    class Doubling(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return (output[0] * 2,)

    def put() -> None:
        HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(Doubling(), "doubling")

    pipe = WAN.build()
    put()
    doubled = WAN.generate(pipe)
    assert not torch.equal(doubled, plain("wan"))
    pipe = WAN.build()
    if ours_first:
        session = unicp.accelerate(pipe, case(name).always_compute)
        put()
    else:
        put()
        session = unicp.accelerate(pipe, case(name).always_compute)
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), doubled)
    session.restore()
    assert torch.equal(WAN.generate(pipe), doubled)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_under_others_hooks_and_beside_a_twin(family: str) -> None:
    """In short, for the families that not every test is run for: hooks inside and outside of ours, removed from the
    inside out, while a second pipeline of the class makes its own video."""
    chosen = FAMILIES[family]
    pipe, twin = chosen.build(), chosen.build()
    before = traces(pipe.transformer)
    inner, outer = (_diffusers(replaces=True, name=name) for name in ("inner", "outer"))
    places = (pipe.transformer, chosen.blocks(pipe.transformer)[1])
    for place in places:
        inner.put(place)
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    for place in places:
        outer.put(place)
    unicp.accelerate(twin, case("schedule-linear").config)
    beside: list[torch.Tensor] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 4:
            beside.append(chosen.generate(twin))
        return {}

    latents = chosen.generate(pipe, **({"callback": callback} if chosen.callbacks else {}))
    beside = beside or [chosen.generate(twin)]
    expected = fresh(family, "adacache-residual")
    assert torch.equal(latents, expected[0])
    assert actions(session.report()) == expected[1]
    assert torch.equal(beside[0], fresh(family, "schedule-linear")[0])
    assert inner.calls and outer.calls
    for place in places:
        inner.take(place)
    inner.calls.clear()
    assert torch.equal(chosen.generate(pipe), expected[0])
    session.restore()
    outer.calls.clear()
    assert torch.equal(chosen.generate(pipe), plain(family))
    assert outer.calls and not inner.calls
    for place in places:
        outer.take(place)
    assert torch.equal(chosen.generate(pipe), plain(family))
    after = traces(pipe.transformer)
    assert [key for key in after if "registry" in key and after[key] != before[key]] == []


def _cast(transformer: Any) -> None:
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def _offload(kind: str) -> Callable[[Any], None]:
    def put(transformer: Any) -> None:
        if OLDER and not torch.accelerator.is_available():
            pytest.skip("group offloading of this diffusers asks for an accelerator")
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        cpu = torch.device("cpu")
        apply_group_offloading(transformer, onload_device=cpu, offload_device=cpu, offload_type=kind, **more)

    return put


def _whole(transformer: Any) -> None:
    """What ``enable_model_cpu_offload`` does with each of a pipeline's models; that wants an accelerator itself."""
    cpu_offload_with_hook(transformer, execution_device=torch.device("cpu"))


def _sequential(transformer: Any) -> None:
    """What ``enable_sequential_cpu_offload`` does: weights are elsewhere until the very module runs."""
    cpu_offload(transformer, execution_device=torch.device("cpu"))
    assert transformer.blocks[0].attn1.to_q.weight.is_meta


PUTS: dict[str, Callable[[Any], None]] = {
    "casting": _cast,
    "offload-block": _offload("block_level"),
    "offload-leaf": _offload("leaf_level"),
    "offload-whole": _whole,
    "offload-sequential": _sequential,
}


@pytest.mark.parametrize(
    ("theirs", "order", "name"),
    covering(PUTS, ["ours-first", "theirs-first"], ["adacache-residual", "unicp-switch", "schedule-linear"]),
)
def test_hooks_that_diffusers_brings(theirs: str, order: str, name: str) -> None:
    pipe, put = WAN.build(), PUTS[theirs]
    put(pipe.transformer)
    expected_plain = WAN.generate(pipe)
    session = unicp.accelerate(pipe, config_on("wan", name))
    expected = WAN.generate(pipe)
    expected_actions = actions(session.report())

    pipe = WAN.build()
    if order == "ours-first":
        session = unicp.accelerate(pipe, config_on("wan", name))
        put(pipe.transformer)
    else:
        put(pipe.transformer)
        session = unicp.accelerate(pipe, config_on("wan", name))
    assert torch.equal(WAN.generate(pipe), expected)
    assert not torch.equal(expected, expected_plain)
    assert actions(session.report()) == expected_actions
    session.restore()
    assert torch.equal(WAN.generate(pipe), expected_plain)
    session = unicp.accelerate(pipe, case(name).always_compute)
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), expected_plain)


def test_a_context_set_before_ours_was_there() -> None:
    """diffusers remembers which modules have hooks from the first ``cache_context`` on (peers, 6)."""
    pipe = WAN.build()
    _diffusers(replaces=False).put(pipe.transformer.blocks[0])
    WAN.generate(pipe)
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    _check(pipe, session, "adacache-residual", None)
