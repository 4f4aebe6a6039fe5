"""Runs that break off, and runs unlike the one before: the next one is right to the last bit, and so is its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import unicp
from tests.contract import FEW_PAIRS, OTHERS, PRIMARY, actions, case, fresh, plain, quietly
from tests.tiny import FAMILIES, Family, denoisers

few = pytest.mark.parametrize(("family", "name"), FEW_PAIRS)
Break = Callable[[Family, Any], None]


class Boom(Exception):
    pass


def _raise_in_call(family: Family, pipe: Any, place: Callable[[Any], Any], number: int, error: BaseException) -> None:
    """Generate with an ordinary torch hook that raises when a submodule runs for the n-th time."""
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == number:
            raise error

    handles = [place(denoiser).register_forward_pre_hook(hook) for denoiser in denoisers(family, pipe)]
    try:
        with pytest.raises(type(error)):
            family.generate(pipe, seed=7)
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] >= number


def _in_a_callback(step: int) -> Break:
    def broken(family: Family, pipe: Any) -> None:
        def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
            if i == step:
                raise Boom
            return {}

        with pytest.raises(Boom):
            family.generate(pipe, seed=7, callback=callback)

    return broken


def _in_a_block(family: Family, pipe: Any) -> None:
    # In the middle block of a computed step: the entry of the stack and the metric are captured, nothing is kept.
    _raise_in_call(family, pipe, lambda d: family.blocks(d)[1].get_submodule(family.attention), 3, Boom())


def _in_the_output_layer(family: Family, pipe: Any) -> None:
    # The stack has run and is kept, the step is neither recorded nor observed.
    _raise_in_call(family, pipe, lambda d: d.proj_out, 2, Boom())


def _between_branches(family: Family, pipe: Any) -> None:
    # As the second branch begins (where there is one): the first has decided this step already.
    calls = len(family.branches) * 2
    _raise_in_call(family, pipe, lambda d: d, calls, KeyboardInterrupt())


def _by_the_pipeline(family: Family, pipe: Any) -> None:
    seen = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        seen.append(i)
        pipe._interrupt = i >= 5
        return {}

    family.generate(pipe, seed=7, callback=callback)
    assert seen == list(range(6))


BREAKS: dict[str, Break] = {
    "callback-0": _in_a_callback(0),
    "callback-5": _in_a_callback(5),
    "block": _in_a_block,
    "output-layer": _in_the_output_layer,
    "keyboard-interrupt": _between_branches,
    "pipe-interrupt": _by_the_pipeline,
}


@few
@pytest.mark.parametrize("broken", BREAKS)
def test_the_next_run_is_right(family: str, name: str, broken: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)
    quietly(lambda: BREAKS[broken](chosen, pipe))
    if broken in ("block", "output-layer"):  # it passed through ours: nothing is kept from there on
        assert session.cached_tensors() == []
    latents, expected = chosen.generate(pipe), fresh(family, name)
    assert torch.equal(latents, expected[0])
    reports = session.reports
    assert actions(reports[-1]) == expected[1]
    # The run that broke off has a report of its own: no more, no less.
    assert len(reports) == 2
    assert 0 < len(reports[0].steps) < len(reports[1].steps)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_after_a_break_and_for_other_requests(family: str) -> None:
    """The two tests around this one, in short, for the families that not every test is run for."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    quietly(lambda: BREAKS["block"](chosen, pipe))
    assert session.cached_tensors() == []
    requests: list[dict[str, Any]] = [*chosen.other.values(), {"prompts": (1, 2)}, {}]
    for number, request in enumerate(requests, start=2):
        latents = quietly(lambda request=request: chosen.generate(pipe, **request))
        expected = fresh(family, "adacache-residual", **request)
        assert torch.equal(latents, expected[0]), request
        assert actions(session.report()) == expected[1], request
        assert len(session.reports) == number


@few
def test_restore_is_right_after_a_break(family: str, name: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)
    quietly(lambda: BREAKS["block"](chosen, pipe))
    session.restore()
    assert torch.equal(chosen.generate(pipe), plain(family))
    assert session.cached_tensors() == []


@few
def test_the_next_run_may_differ(family: str, name: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)
    requests: list[dict[str, Any]] = [
        {},
        *chosen.other.values(),
        {"steps": 7},
        {"prompts": (1, 2)},
        {"guidance": False},
        {"seed": 3},
        {},
    ]
    for number, request in enumerate(requests, start=1):
        latents = quietly(lambda request=request: chosen.generate(pipe, **request))
        expected = fresh(family, name, **request)
        assert torch.equal(latents, expected[0]), request
        assert actions(session.report()) == expected[1], request
        assert len(session.reports) == number


@few
@pytest.mark.parametrize("change", ["size", "prompts", "guidance"])
def test_a_break_and_then_another_request(family: str, name: str, change: str) -> None:
    """Nothing kept for the broken run fits the next one."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)
    quietly(lambda: BREAKS["callback-5"](chosen, pipe))
    request: dict[str, Any] = {"prompts": {"prompts": (1, 2)}, "guidance": {"guidance": False}, **chosen.other}[change]
    expected = fresh(family, name, **request)
    assert torch.equal(quietly(lambda: chosen.generate(pipe, **request)), expected[0])
    assert actions(session.report()) == expected[1]


def test_another_dtype_is_another_generation() -> None:
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)

    chosen.generate(pipe)
    pipe.transformer.to(torch.bfloat16)
    latents = chosen.generate(pipe)
    assert latents.isfinite().all()
    assert len(session.reports) == 2
    whole, half = (report.cache_bytes for report in session.reports)
    assert half * 2 == whole + 4  # the sum of what is measured stays in float32


@pytest.mark.parametrize("family", PRIMARY)
def test_diffusers_reset_ends_a_generation(family: str) -> None:
    """``_reset_stateful_cache`` in the middle of a run frees everything; the run goes on as a new generation."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    held: list[int] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 2:
            held.append(len(session.cached_tensors()))
            for denoiser in denoisers(chosen, pipe):
                denoiser._reset_stateful_cache()
            held.append(len(session.cached_tensors()))
        return {}

    chosen.generate(pipe, callback=callback)
    assert held[0] > 0
    assert held[1] == 0
    reports = session.reports
    assert [r.index for r in reports[0].steps] == [i for i in range(3) for _ in chosen.branches]
    # Warm-up again: the first two steps after the reset are computed.
    after = [r.action for r in reports[1].steps][: 2 * len(chosen.branches)]
    assert after == ["compute"] * len(after)
    assert torch.equal(chosen.generate(pipe), fresh(family, "adacache-residual")[0])
