"""What fills a skipped call comes from that guidance branch alone, and what is kept is as much as is reported."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import unicp
from tests.contract import CODEBOOK, FEW, FEW_PAIRS, FEWER, FULL, ONCE, case, quietly
from tests.tiny import FAMILIES, Family, denoisers
from unicp.policies.plans.step_plan import DAMPING, computing
from unicp.tensors.extrapolation import extrapolate, share, steadiness, weights

few = pytest.mark.parametrize(("family", "name"), FEW_PAIRS)
families = pytest.mark.parametrize("family", ONCE)
SLOW = pytest.mark.slow


def _tensors(value: Any) -> list[torch.Tensor]:
    value = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [v.detach().clone() for v in (value if isinstance(value, tuple) else (value,))]


def watched_run(family: Family, pipe: Any, **request: Any) -> dict[str, list[list[torch.Tensor]]]:
    """Per call: the streams into the first block, out of the last one, and the denoiser's output; by torch hooks."""
    seen: dict[str, list[list[torch.Tensor]]] = {"entered": [], "left": [], "output": []}

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams = [*args, *kwargs.values()][: family.streams]  # they come first in all of these models
        seen["entered"].append([stream.detach().clone() for stream in streams])

    def leave(_: Any, __: Any, output: Any) -> None:
        seen["left"].append(_tensors(output))

    def out(_: Any, __: Any, output: Any) -> None:
        seen["output"].append(_tensors(output))

    with ExitStack() as stack:
        for denoiser in denoisers(family, pipe):
            blocks = family.blocks(denoiser)
            for handle in (
                blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
                blocks[-1].register_forward_hook(leave),
                denoiser.register_forward_hook(out),
            ):
                stack.callback(handle.remove)
        family.generate(pipe, **request)
    return seen


def _aligned(entered: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The first block's input in the last block's layout, token by token, where they differ (Latte)."""
    if entered.shape == left.shape:
        return entered
    frames, tokens = left.shape[1], entered.shape[1]  # (B*F, S, C) -> (B*S, F, C)
    aligned = torch.empty_like(left)
    for b in range(entered.shape[0] // frames):
        for f in range(frames):
            for s in range(tokens):
                aligned[b * tokens + s, f] = entered[b * frames + f, s]
    return aligned


def _by_branch(report: unicp.SessionReport) -> dict[tuple[str, str], list[tuple[int, unicp.StepRecord]]]:
    found: dict[tuple[str, str], list[tuple[int, unicp.StepRecord]]] = {}
    for number, record in enumerate(report.steps):
        found.setdefault((record.denoiser, record.branch), []).append((number, record))
    return found


@families
def test_a_filled_stack_is_the_branchs_own_residual(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    seen = watched_run(chosen, pipe)
    last: dict[tuple[str, str], list[torch.Tensor]] = {}
    filled = 0
    for key, calls in _by_branch(session.report()).items():
        for number, record in calls:
            into, out = seen["entered"][number], seen["left"][number]
            entered = [_aligned(a, b) for a, b in zip(into, out, strict=True)]
            assert len(out) == chosen.streams
            entered, out = entered[: chosen.kept], out[: chosen.kept]
            if record.action == "compute":
                last[key] = [b - a for a, b in zip(entered, out, strict=True)]
            else:
                filled += 1
                for a, b, residual in zip(entered, out, last[key], strict=True):
                    assert torch.equal(b, a + residual)
    assert filled >= 2 * len(chosen.branches)
    if len(chosen.branches) == 2:  # had they been mixed up, it would have shown
        cond, uncond = (last["transformer", branch][0] for branch in chosen.branches)
        assert (cond - uncond).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("fill", "family"),
    [
        # How outputs are put together is the same code for all families.
        pytest.param(fill, param.values[0], marks=param.marks if fill == "linear" or param.values[0] in FULL else SLOW)
        for fill in ("reuse", "linear", "quadratic")
        for param in ONCE
    ],
)
def test_a_filled_output_is_the_branchs_own(family: str, fill: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    damping = 0.5
    session = unicp.accelerate(pipe, unicp.ScheduleConfig(interval=3, fill=fill, damping=damping))
    outputs = [out[0] for out in watched_run(chosen, pipe)["output"]]
    checked = 0
    for calls in _by_branch(session.report()).values():
        known: list[tuple[float, torch.Tensor]] = []  # newest first
        for number, record in calls:
            if record.action == "compute":
                known.insert(0, (record.sigma, outputs[number].double()))
                continue
            # Where the sampler draws noise, outputs are repeated.
            order = 1 if family == "allegro" else {"reuse": 1, "linear": 2, "quadratic": 3}[fill]
            points = known[:order]
            expected = torch.zeros_like(points[0][1])
            for j, (sigma, value) in enumerate(points):  # Lagrange, literally
                factor = 1.0
                for k, (other, _) in enumerate(points):
                    factor *= (record.sigma - other) / (sigma - other) if k != j else 1.0
                expected += factor * value
            beyond = abs(record.sigma - points[0][0]) / abs(points[0][0] - points[1][0]) if len(points) > 1 else 1.0
            weight = damping ** ((len(points) - 1) * max(0.0, beyond - 1))
            expected = weight * expected + (1 - weight) * points[0][1]
            torch.testing.assert_close(outputs[number].double(), expected, rtol=1e-5, atol=1e-5)
            assert record.action == ("reuse" if len(points) == 1 else "forecast")
            checked += 1
    assert checked >= 4 * len(chosen.branches)


def test_a_reused_unit_gives_the_branchs_own_output() -> None:
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("unicp-online").config)
    outputs: list[torch.Tensor] = []
    pipe.transformer.blocks[1].attn1.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    chosen.generate(pipe)
    last: dict[str, torch.Tensor] = {}
    reused = 0
    for record, output in zip(session.report().steps, outputs, strict=True):
        if record.units.get("blocks.1.attn1") == "reuse":
            assert torch.equal(output, last[record.branch])
            reused += 1
        else:
            last[record.branch] = output
    assert reused >= 4
    assert not torch.equal(last["cond"], last["uncond"])


def test_swapped_branches_would_be_noticed() -> None:
    """The tests above can fail: with the branches' residuals swapped, the latents are others."""
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    right = chosen.generate(pipe)

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == 1:
            fills = session._hooked[0].run._fills
            fills["cond"], fills["uncond"] = fills["uncond"], fills["cond"]
        return {}

    wrong = chosen.generate(pipe, callback=callback)
    assert (right - wrong).abs().max() > 1e-4


@pytest.mark.parametrize("name", FEW)
def test_a_branch_that_comes_late_is_computed_first(name: str) -> None:
    """Guidance switched on at step 3, which the other branch skips."""
    chosen = FAMILIES["wan"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        pipe._guidance_scale = 4.0 if i >= 2 else 1.0
        return {}

    latents = chosen.generate(pipe, guidance=False, callback=callback)
    assert latents.isfinite().all()
    actions = {(r.index, r.branch): r.action for r in session.report().steps}
    assert actions[2, "cond"] != "compute"
    assert actions[4, "cond"] == ("compute" if name.startswith("adacache") else actions[2, "cond"])
    first = min(index for index, branch in actions if branch == "uncond")
    assert first == 3
    assert actions[3, "uncond"] == "compute"
    assert len(session.reports) == 1


@pytest.mark.parametrize("family", ["wan", "ltx", "latte"])
@pytest.mark.parametrize("prompts", [(1, 2), (2, 1)])
def test_the_worst_sample_of_a_batch_decides(family: str, prompts: tuple[int, ...]) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(
        pipe, unicp.AdaCacheConfig(codebook=CODEBOOK, metric_kind="block", metric_location="end")
    )
    caught: dict[str, torch.Tensor] = {}
    residuals: list[torch.Tensor] = []
    block = chosen.blocks(pipe.transformer)[-1]
    first = chosen.branches[0]

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught["in"] = args[0] if args else kwargs["hidden_states"]

    def after(_: Any, __: Any, output: Any) -> None:
        rows = chosen.rows * len(prompts)
        residuals.append((output - caught["in"]).reshape(rows, -1).clone())

    block.register_forward_pre_hook(before, with_kwargs=True)
    block.register_forward_hook(after)
    chosen.generate(pipe, prompts=prompts)
    records = session.report().steps
    mine = [(r, p) for r, p in zip(records, residuals, strict=True) if r.branch == first and r.action == "compute"]
    assert len(mine) > 4
    for (_, old), (record, new) in itertools.pairwise(mine):
        change = (new - old).abs().sum(1) / old.abs().sum(1)
        assert record.metric == pytest.approx(float(change.max()), rel=1e-4)
        assert float(change.max()) > float(change.mean()) * 1.001


def _live_bytes() -> int:
    """Bytes of every tensor in this process that is not frozen (see ``gc.freeze``), each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _at_step(step: int, measure: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        if i == step:
            measure()
        return {}

    return callback


@few
@pytest.mark.usefixtures("only_new_objects")
def test_reported_bytes_are_held_bytes(family: str, name: str) -> None:
    """Counted from outside: all tensors alive at a skipped step, with and without unicp."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    live: list[int] = []
    step = 3  # skipped in all of these cases
    chosen.generate(pipe, callback=_at_step(step, lambda: live.append(_live_bytes())))
    config = case(name).config
    if name == "schedule-linear":
        config = config.replace(interval=7)
    session = unicp.accelerate(pipe, config)
    held: list[int] = []

    def measure() -> None:
        assert session.records[-1].action != "compute"
        live.append(_live_bytes())
        held.append(sum(t.untyped_storage().nbytes() for t in session.cached_tensors()))

    chosen.generate(pipe, callback=_at_step(step, measure))
    assert live[1] - live[0] == held[0] == session.report().cache_bytes


@pytest.mark.parametrize("family", FEWER)
def test_adacache_keeps_one_hidden_state_a_branch_and_the_metric(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    sizes: list[int] = []
    seen = watched_run(chosen, pipe)
    for streams in seen["left"]:
        sizes.append(sum(stream.numel() * 4 for stream in streams[: chosen.kept]))
    calls = len(chosen.branches)
    assert sizes == sizes[:calls] * (len(sizes) // calls)
    metric = seen["left"][0][0].numel() * 4
    sums_of_frames = session.report().cache_bytes - sum(sizes[:calls]) - metric
    assert 0 < sums_of_frames <= metric / 16 and metric % sums_of_frames == 0


@few
@pytest.mark.usefixtures("only_new_objects")
def test_nothing_is_kept_after_a_run(family: str, name: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case(name).config)
    kept: list[weakref.ref[torch.Tensor]] = []
    # Before the pipeline ends (it decodes then): nothing is left after the last step.
    left: list[int] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        kept.extend(weakref.ref(tensor) for tensor in session.cached_tensors())
        if i == 9:
            left.append(len(session.cached_tensors()))
        return {}

    chosen.generate(pipe, callback=callback)
    assert left == [0]
    assert session.cached_tensors() == []
    gc.collect()
    assert kept
    assert [ref for ref in kept if ref() is not None] == []


@pytest.mark.parametrize("family", [param for param in FEWER if FAMILIES[param.values[0]].callbacks])
def test_separate_decisions_keep_nothing_after_the_last_step(family: str) -> None:
    chosen = FAMILIES[family]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-separate-moreg").config)
    left: list[int] = []
    quietly(lambda: chosen.generate(pipe, callback=_at_step(9, lambda: left.append(len(session.cached_tensors())))))
    assert left == [0]


def test_the_first_denoiser_keeps_nothing_once_the_second_works() -> None:
    chosen = FAMILIES["wan2.2"]
    pipe = chosen.build()
    session = unicp.accelerate(pipe, case("adacache-residual").config)
    owners: list[list[int]] = []

    def callback(_: Any, i: int, *__: Any) -> dict[str, Any]:
        owners.append([len(each.run.tensors()) if each.run else 0 for each in session._hooked])
        return {}

    chosen.generate(pipe, callback=callback)
    assert all(first > 0 and second == 0 for first, second in owners[:5])
    assert all(first == 0 for first, _ in owners[5:])
    assert all(second > 0 for _, second in owners[5:9])


PLAN = computing(10, {0, 1, 2, 4, 7, 9})


@pytest.mark.parametrize("family", ["wan", "hunyuan-video-1.5"])
def test_each_branch_is_forecast_from_its_own_outputs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit what the same is by hand, on the pipeline without us."""
    chosen = FAMILIES[family]
    pipe = chosen.build()
    plain = pipe.transformer.forward
    kept: tuple[list[Any], list[Any]] = ([], [])  # (sigma, output, steadiness) of each branch, newest first
    calls = 0

    def by_hand(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        (step, branch), calls = divmod(calls, 2), calls + 1
        sigma = float(pipe.scheduler.sigmas[step])
        if step not in PLAN.compute:
            (one, last, steady), (other, before, _) = kept[branch][:2]
            part = torch.tensor(0.0) if steady is None else share(steady)
            return (extrapolate([last, before], weights([one, other], sigma, DAMPING), part),)
        output = plain(*args, **kwargs)
        known = [tensor for _, tensor, _ in kept[branch][:2]]
        steady = steadiness(output[0], *known) if len(known) > 1 else None
        kept[branch].insert(0, (sigma, output[0].clone(), steady))
        return output

    pipe.transformer.forward = by_hand
    wanted = chosen.generate(pipe)
    del pipe.transformer.forward
    assert calls == 20
    monkeypatch.setattr("unicp.policies.plans.step_plan.untuned", lambda *_, **__: PLAN)
    config = unicp.BudgetConfig(target_speedup=1.0, override_reserve=0.0, correct=False, leap=0.0)
    with unicp.accelerate(pipe, config) as session:
        made = chosen.generate(pipe)
        report = session.report()
    assert torch.equal(made, wanted)
    assert {record.index for record in report.steps if record.action == "compute"} == set(PLAN.compute)
    assert report.computed_fraction == pytest.approx(0.6)
