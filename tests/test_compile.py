"""``torch.compile``, before and after ``accelerate``: same results, no recompiles, reused steps still skip.

Dynamo does its work with the backends "eager" and "aot_eager" too, in seconds; one slow test goes through inductor.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import unicp
from tests.contract import actions, case, covering, fresh, plain, quietly, traces
from tests.tiny import FAMILIES, LAYERS, wan_transformer
from unicp.errors import UnicpError
from unicp.hosts.diffusers.compiled import COMPILED_CALL

WAN = FAMILIES["wan"]
NAMES = ("adacache-residual", "adacache-forecast", "schedule-stack", "schedule-linear", "budget-default")
INSIDE = ("unicp-online", "unicp-in-adacache", "unicp-maps")


def _blocks(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile_repeated_blocks(**options)


def _whole(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile(**options)


def _wrapped(pipe: Any, **options: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **options)


WAYS: dict[str, Callable[..., None]] = {"blocks": _blocks, "whole": _whole, "wrapped": _wrapped}


def quick(name: str, way: str, order: str) -> bool:
    """Whether ``make test`` compiles so: each config once, every way with hooks on blocks and on units."""
    if (way, order) == ("blocks", "before"):
        return name in ("adacache-forecast", "schedule-stack", "budget-default", "unicp-in-adacache")
    return (name, way, order) in (
        ("schedule-linear", "blocks", "after"),
        ("adacache-residual", "whole", "before"),
        ("adacache-residual", "wrapped", "after"),
        ("unicp-online", "wrapped", "before"),
        ("unicp-maps", "whole", "before"),
    )


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


ONE_GRAPH = (("adacache-residual", "before"), ("schedule-stack", "after"), ("budget-default", "after"))
"""Of blocks compiled as one graph: hooks on them from before and from afterwards, and none on them."""


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def accelerated(pipe: Any, name: str, way: str, order: str, **options: Any) -> unicp.Session:
    if order == "before":
        WAYS[way](pipe, **options)
    session = unicp.accelerate(pipe, case(name).config)
    if order == "after":
        WAYS[way](pipe, **options)
    return session


def check(name: str, way: str, order: str, **options: Any) -> None:
    """Two runs: the first compiles, the second must not, and both are those of the uncompiled model."""
    pipe = WAN.build()
    session = accelerated(pipe, name, way, order, **options)
    expected, expected_actions = fresh("wan", name)[:2]
    first = quietly(lambda: WAN.generate(pipe))
    made = graphs()
    assert made > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = quietly(lambda: WAN.generate(pipe))
    assert graphs() == made
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)
    for report in session.reports:
        # What was decided; what was measured may differ in its last digits.
        assert [action[:4] for action in actions(report)] == [action[:4] for action in expected_actions]
    assert not session.cached_tensors()


@pytest.mark.parametrize(
    ("name", "way", "order"),
    [
        pytest.param(name, way, order, marks=() if quick(name, way, order) else pytest.mark.slow)
        for name in (*NAMES, *INSIDE)
        for way in WAYS
        for order in ("before", "after")
    ],
)
def test_compiled_equals_uncompiled(name: str, way: str, order: str) -> None:
    check(name, way, order, backend="eager")


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=() if (name, order) in ONE_GRAPH else pytest.mark.slow)
        for name in NAMES
        for order in ("before", "after")
    ],
)
def test_blocks_of_one_graph(name: str, order: str) -> None:
    """The usual way of compiling with diffusers: whatever is decided between blocks needs no break in them."""
    check(name, "blocks", order, backend="aot_eager", fullgraph=True)
    assert graphs() == 1


@pytest.mark.parametrize(("name", "way"), covering(["adacache-residual", "unicp-online"], ["blocks", "whole"]))
def test_a_deep_model_makes_no_more_graphs(name: str, way: str) -> None:
    """Hooks of their own must not make dynamo compile each block anew: from the ninth on it would give up."""
    made = []
    for layers in (LAYERS, 10):
        torch._dynamo.reset()
        counters.clear()
        pipe = WAN.build()
        pipe.transformer = wan_transformer(layers=layers)
        accelerated(pipe, name, way, "after", backend="eager")
        quietly(lambda pipe=pipe: WAN.generate(pipe))
        made.append(graphs())
    assert made[0] == made[1]


def test_reused_steps_run_no_compiled_code() -> None:
    ran: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return run

    for name in ("schedule-stack", "schedule-linear", "adacache-residual"):
        torch._dynamo.reset()
        pipe = WAN.build()
        session = accelerated(pipe, name, "blocks", "before", backend=counting)
        quietly(lambda pipe=pipe: WAN.generate(pipe))
        ran.clear()
        quietly(lambda pipe=pipe: WAN.generate(pipe))
        computed = [record for record in session.report().steps if record.action == "compute"]
        # One block runs uncompiled where it is measured: in the first branch of each computed step.
        measured = sum(record.branch == "cond" for record in computed) if name.startswith("adacache") else 0
        assert 0 < len(computed) < len(session.report().steps)
        assert len(ran) == LAYERS * len(computed) - measured


@pytest.mark.parametrize(("name", "way"), covering(["adacache-residual", "unicp-online"], WAYS))
def test_restored_is_as_it_was_compiled(name: str, way: str) -> None:
    pipe = WAN.build()
    WAYS[way](pipe, backend="eager")
    transformer = getattr(pipe.transformer, "_orig_mod", pipe.transformer)
    before = traces(transformer), [module.__dict__.get(COMPILED_CALL) for module in transformer.modules()]
    with unicp.accelerate(pipe, case(name).config):
        quietly(lambda: WAN.generate(pipe))
    assert (traces(transformer), [module.__dict__.get(COMPILED_CALL) for module in transformer.modules()]) == before
    torch.testing.assert_close(WAN.generate(pipe), plain("wan"))


@pytest.mark.parametrize("name", ["adacache-residual", "unicp-online"])
def test_compiled_between_two_runs_and_compiled_anew(name: str) -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, case(name).config)
    expected, expected_actions = fresh("wan", name)[:2]
    for compile_it in (None, _blocks, _blocks, _whole):
        if compile_it is not None:
            compile_it(pipe, backend="eager")
        torch.testing.assert_close(quietly(lambda: WAN.generate(pipe)), expected)
        assert actions(session.report()) == expected_actions
    session.restore()
    torch.testing.assert_close(WAN.generate(pipe), plain("wan"))


@pytest.mark.parametrize("way", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_another_size_and_steps(way: str) -> None:
    """A new shape is compiled once; the numbers of steps and the decisions are nothing to compile for."""
    pipe = WAN.build()
    accelerated(pipe, "adacache-residual", way, "before", backend="eager", dynamic=False)
    for request in ({"size": 48}, {}, {"steps": 7}, {"size": 48, "steps": 6}, {"guidance": False}):
        known = request.get("steps") or "guidance" in request
        with torch._dynamo.config.patch(error_on_recompile=bool(known)):
            latents = quietly(lambda request=request: WAN.generate(pipe, **request))
        torch.testing.assert_close(latents, fresh("wan", "adacache-residual", **request)[0])


def test_one_graph_that_a_method_has_to_look_into_is_refused() -> None:
    pipe = WAN.build()
    accelerated(pipe, "unicp-online", "blocks", "before", backend="eager", fullgraph=True)
    with pytest.raises(UnicpError, match=r"was compiled with fullgraph=True.*compile without"):
        WAN.generate(pipe)
    unicp.restore(pipe)
    torch.testing.assert_close(WAN.generate(pipe), plain("wan"))
    for way in ("whole", "wrapped"):
        pipe = WAN.build()
        accelerated(pipe, "schedule-linear", way, "before", backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compile_repeated_blocks\(fullgraph=True\)"):
            WAN.generate(pipe)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("way", ["blocks", "whole"])
@pytest.mark.parametrize("name", ["adacache-residual", "unicp-online"])
def test_inductor(name: str, way: str) -> None:
    check(name, way, "before")
