"""UniCP: plans against a literal one, the engine against modules that cache themselves, slicing head by head."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from hypothesis import given, settings
from hypothesis import strategies as st

import unicp
from tests.contract import config_on, profile_of, quietly
from tests.reference.unicp_literal import Forecasting, SelfCaching, Together, profiled_plan, sliced_attention
from tests.tiny import FAMILIES, wan_transformer
from unicp.engine.slicing.attention import SlicedAttention, basis, choose_ranks, second_moments
from unicp.engine.slicing.instrumented import instrumented
from unicp.engine.slicing.maps import MapAttention, attention_map
from unicp.errors import UnicpError
from unicp.policies import Step
from unicp.policies.unicp import UniCPConfig, UniCPPolicy, planned
from unicp.policies.unit_errors import UnitErrors, error_after
from unicp.profiles import Profile
from unicp.tensors.packed import Packed

WAN = FAMILIES["wan"]
PAPER = UniCPConfig(fill="reuse", windows="unit", delta_mlp=0.0, pcas=True)
"""The paper, as we read it."""


# --- plans ------------------------------------------------------------------------------------------------------------

error = st.floats(0, 1)


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    count, window = draw(st.integers(2, 14)), draw(st.integers(1, 5))
    return [[draw(error) for _ in range(window)] for _ in range(count)]


def errors_of(table: list[list[float]], **more: Any) -> UnitErrors:
    sigmas = [1 - i / len(table) for i in range(len(table))]
    return UnitErrors(sigmas=sigmas, steps=len(table), cache={"a": table}, **more)


@settings(max_examples=300, deadline=None)
@given(
    tables(), st.sampled_from([0, 0.1, 0.4, 0.7, 1.0]), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3),
    st.sampled_from([None, 0.1, 0.5]), st.booleans(),
)  # fmt: skip
def test_profiled_windows_and_shifts_are_those_of_the_literal_plan(
    table: list[list[float]], delta: float, window: int, warmup: int, cooldown: int, sliced: float | None, refresh: bool
) -> None:
    config = PAPER.replace(
        delta=delta, delta_prune=0.3, max_window=window, warmup_steps=warmup, cooldown_steps=cooldown,
        refresh_from_sliced=refresh,
    )  # fmt: skip
    errors = errors_of(table, sliced={} if sliced is None else {"a": sliced})
    literal = profiled_plan(
        table, delta=delta, max_window=window, warmup=warmup, cooldown=cooldown, sliced=sliced, delta_prune=0.3,
        refresh=refresh,
    )  # fmt: skip
    assert [plan["a"] for plan in planned(config, errors, {"a": "self_attention"})] == literal


@settings(max_examples=100, deadline=None)
@given(tables(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_delta_never_computes_more_at_flat_errors(table: list[list[float]], low: float, high: float) -> None:
    # Errors that only grow with the distance and are the same from every anchor: then windows are nested.
    row = sorted(table[0])
    errors = errors_of([row for _ in table])
    counts = []
    for delta in sorted((low, high)):
        plans = planned(PAPER.replace(delta=delta, warmup_steps=1), errors, {"a": "self_attention"})
        counts.append(sum(plan["a"] == "compute" for plan in plans))
    assert counts[1] <= counts[0]


def test_every_kind_has_its_own_threshold() -> None:
    errors = UnitErrors(sigmas=[1 - i / 6 for i in range(6)], steps=6, cache={u: [[0.05]] * 6 for u in "axm"})
    config = PAPER.replace(delta=0.1, delta_cross=0.01, delta_mlp=0.06, warmup_steps=1, max_window=1)
    plans = planned(config, errors, {"a": "self_attention", "x": "cross_attention", "m": "mlp"})
    assert [set(plan[u] for plan in plans) for u in "axm"] == [{"compute", "reuse"}, {"compute"}, {"compute", "reuse"}]


def test_an_online_window_grows_by_one_and_a_spike_resets_it() -> None:
    policy = UniCPPolicy(PAPER.replace(delta=0.1, warmup_steps=1, cooldown_steps=0, max_window=3))
    policy.attach({"a": "self_attention"}, (), None)
    trace, computed_at = [], 0
    for index in range(16):
        step = Step(index=index, count=16, position=index, sigma=1 - index / 16)
        plan = policy.decide(step)
        action = plan.units.get("a", "compute")
        trace.append(action[0])
        if action == "compute":
            change = None if index == 0 else 0.5 if index == 10 else 0.01
            policy.observe_units(step, {"a": (index - computed_at, change)})
            computed_at = index
    assert "".join(trace) == "ccrcrrcrrrccrcrr"


@pytest.mark.parametrize("change", [None, float("nan"), float("inf")])
def test_what_is_no_number_is_never_a_reason_to_reuse(change: float | None) -> None:
    policy = UniCPPolicy(PAPER.replace(delta=0.1, warmup_steps=1, cooldown_steps=0))
    policy.attach({"a": "self_attention"}, (), None)
    for index in range(6):
        step = Step(index=index, count=6, position=index, sigma=1 - index / 6)
        assert policy.decide(step).action == "compute"
        policy.observe_units(step, {"a": (1, change)})


def test_other_step_counts_are_translated_by_sigma() -> None:
    errors = UnitErrors(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2], steps=5, cache={"a": [[0.1, 0.3]] * 5})
    assert errors.place(3, 10, 0.7) == pytest.approx(1.5)
    assert errors.place(0, 10, 2.0) == 0
    assert errors.place(9, 10, 0.01) == 4
    assert error_after(errors.cache["a"], 1, 1.5) == pytest.approx(0.05)
    assert error_after(errors.cache["a"], 1, 2.5) == pytest.approx(0.2)
    assert error_after(errors.cache["a"], 1, 3.5) == math.inf
    # Of a forecast from nodes two steps apart in place of one: d (d + h) = 4 in place of 2.
    assert error_after(errors.cache["a"], 1, 2.0, spacing=3.0) == pytest.approx(0.2)


# --- the engine -------------------------------------------------------------------------------------------------------


def test_the_engine_plays_the_plan_of_the_profile() -> None:
    config = config_on("wan", "unicp-windows").replace(delta=0.02, delta_mlp=0.01, statistic="mean")
    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    WAN.generate(pipe)
    profile = Profile.load(profile_of("wan"))
    lines = session.report().unit_timeline()
    assert lines
    for unit, line in lines.items():
        table = profile.tensors[f"transformer/{unit}/cache_mean"].tolist()
        delta = config.delta_mlp if unit.endswith("ffn") else config.delta
        literal = profiled_plan(table, delta=delta, max_window=3, warmup=2, cooldown=1)
        assert line == "".join({"compute": "#", "reuse": "."}[action] for action in literal), unit


def test_online_windows_equal_modules_that_cache_themselves() -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, PAPER.replace(delta=0.02, delta_mlp=0.012, max_window=2))
    ours = WAN.generate(pipe)
    lines = session.report().unit_timeline()

    slow = WAN.build()
    made: dict[str, SelfCaching] = {}
    for i, block in enumerate(slow.transformer.blocks):
        for name, delta in (("attn1", 0.02), ("attn2", 0.02), ("ffn", 0.012)):
            wrapper = SelfCaching(getattr(block, name), 10, 2, delta, 2, warmup=2, cooldown=1)
            setattr(block, name, wrapper)
            made[f"blocks.{i}.{name}"] = wrapper
    theirs = WAN.generate(slow)
    assert torch.equal(ours, theirs)
    signs = {"compute": "#", "reuse": "."}
    assert lines == {name: "".join(signs[a] for a in wrapper.trace) for name, wrapper in made.items()}
    assert len({line for line in lines.values()}) > 1, "all modules did the same; the test sees too little"


@pytest.mark.parametrize("windows", ["shared", "block", "unit"])
def test_forecast_windows_equal_modules_that_forecast_themselves(windows: str) -> None:
    limits = {"attn1": 0.6, "attn2": 0.4, "ffn": 0.3}
    config = UniCPConfig(
        delta=0.6, delta_cross=0.4, delta_mlp=0.3, max_window=2, windows=windows, correct=False
    )  # fmt: skip
    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    ours = WAN.generate(pipe)
    report = session.report()
    sigmas = [record.sigma for record in report.steps if record.branch == report.steps[0].branch]

    slow = WAN.build()
    groups: dict[str, Together] = {}
    made: dict[str, Together] = {}
    for i, block in enumerate(slow.transformer.blocks):
        for name, limit in limits.items():
            unit = f"blocks.{i}.{name}"
            group = {"shared": "", "block": str(i), "unit": unit}[windows]
            made[unit] = groups.setdefault(group, Together(sigmas, 2, 2, warmup=2, cooldown=1, damping=0.85))
            setattr(block, name, Forecasting(getattr(block, name), made[unit], limit))
    theirs = WAN.generate(slow)
    assert torch.equal(ours, theirs)
    signs = {"compute": "#", "forecast": "~"}
    assert report.unit_timeline() == {name: "".join(signs[a] for a in of.trace) for name, of in made.items()}
    assert any("~" in line for line in report.unit_timeline().values())


def test_kept_outputs_are_two_where_forecasts_are_made_and_one_elsewhere() -> None:
    held = []
    for fill in ("reuse", "forecast"):
        pipe = WAN.build()
        config = UniCPConfig(delta=50.0, delta_cross=0, delta_mlp=0, fill=fill, correct=False, max_window=2)
        session = unicp.accelerate(pipe, config)
        WAN.generate(pipe)
        held.append(session.report().cache_bytes)
    assert held[1] == 2 * held[0]


def test_what_the_stack_measures_is_always_computed() -> None:
    pipe = WAN.build()
    stack = unicp.AdaCacheConfig(codebook=((1e6, 2),))
    session = unicp.accelerate(pipe, PAPER.replace(delta=0.9, delta_mlp=0.9, stack=stack))
    WAN.generate(pipe)
    lines = session.report().unit_timeline()
    assert "." not in lines["blocks.1.attn1"]  # the middle of three blocks
    assert "." in lines["blocks.0.attn1"] and "." in lines["blocks.1.attn2"]


def test_without_a_profile_the_report_says_that_nothing_was_sliced() -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, PAPER.replace(delta=0.5))
    WAN.generate(pipe)
    assert "needs a profile" in str(session.report())
    assert max(len(line) for line in str(session.report()).splitlines()) <= 80


def test_a_run_that_never_acts_is_told_so() -> None:
    pipe = WAN.build()
    unicp.accelerate(pipe, PAPER.replace(delta=1e-9))
    with pytest.warns(unicp.UnicpWarning, match="times what delta admits"):
        WAN.generate(pipe)


# --- slicing ----------------------------------------------------------------------------------------------------------


def attention(seed: int = 0) -> WanAttention:
    torch.manual_seed(seed)
    module: WanAttention = wan_transformer(seed).blocks[0].attn1
    for parameter in module.parameters():  # biases and norms that do something
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def rotary(tokens: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(1, tokens, 1, size // 2, generator=torch.Generator().manual_seed(1)) * 6
    return angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)


def captured(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as they enter the dot product, as (B, H, T, d)."""
    found: list[torch.Tensor] = []

    def attend(call: Any, heads_first: bool, *qkv: Any, **more: Any) -> Any:
        found.extend(t if heads_first else t.transpose(1, 2) for t in qkv)
        return call(*qkv, **more)

    own = module.processor
    module.processor = instrumented(own, attend)
    module(*args, **kwargs)
    module.processor = own
    return tuple(found)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("rank_qk", "rank_v"), [(4, 4), (4, 8), (8, 4), (12, 12)])
def test_sliced_attention_equals_the_literal_one(rank_qk: int, rank_v: int, fold: bool) -> None:
    module = attention()
    x = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(2))
    query, key, value = captured(module, x, None, None, rotary(10))
    p_qk = basis(second_moments(query, True) + second_moments(key, True), rank_qk)
    p_v = basis(second_moments(value, True), rank_v)
    heads = sliced_attention(query, key, value, p_qk, p_v).float()  # (B, H, T, d)
    literal = module.to_out[0](heads.transpose(1, 2).flatten(2))
    sliced = SlicedAttention(module, p_qk, p_v, fold)
    ours = sliced(module.forward, (x, None, None, rotary(10)), {})
    torch.testing.assert_close(ours, literal, rtol=2e-5, atol=2e-5)
    if rank_qk == rank_v == 12:
        torch.testing.assert_close(ours, module(x, None, None, rotary(10)), rtol=2e-5, atol=2e-5)
    else:
        assert not torch.allclose(ours, module(x, None, None, rotary(10)), rtol=1e-3, atol=1e-3)
    assert bool(sliced.tensors())


def test_a_smaller_head_size_reaches_the_kernel() -> None:
    module = attention()
    x = torch.randn(1, 6, 24)
    seen: list[tuple[int, ...]] = []

    def spy(*qkv: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen.append(tuple(t.shape[-1] for t in qkv))
        assert kwargs["scale"] == pytest.approx(12**-0.5)
        return torch.zeros_like(qkv[2])

    p = torch.eye(12).expand(2, 12, 12)
    sliced = SlicedAttention(module, p[..., :4], p[..., :8])
    sliced._attend(spy, False, *(torch.randn(1, 6, 2, 12) for _ in range(3)))
    assert seen == [(8, 8, 8)]
    assert x.shape == (1, 6, 24)


def test_changed_weights_are_folded_again() -> None:
    module = attention()
    x = torch.randn(1, 6, 24)
    p = torch.linalg.qr(torch.randn(2, 12, 12))[0]
    folded, online = (
        SlicedAttention(module, p[..., :8], p[..., :8], True),
        SlicedAttention(module, p[..., :8], p[..., :8]),
    )
    call: Any = (module.forward, (x,), {})
    torch.testing.assert_close(folded(*call), online(*call), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        module.to_v.weight.mul_(1.5)
        module.to_out[0].weight.add_(0.1)
    torch.testing.assert_close(folded(*call), online(*call), rtol=1e-5, atol=1e-5)
    module.to_v = torch.nn.Sequential(module.to_v)  # as an adapter would
    torch.testing.assert_close(folded(*call), online(*call), rtol=1e-5, atol=1e-5)
    assert folded._folded is None


def test_outputs_in_eight_bits_take_a_quarter_of_float32_and_serve_nearly_as_well() -> None:
    pipe = FAMILIES["wan"].build()
    plain = FAMILIES["wan"].generate(pipe)
    off, kept = {}, {}
    for storage in ("full", "int8"):
        with unicp.accelerate(pipe, UniCPConfig(target_speedup=1.3, storage=storage)) as session:
            made = FAMILIES["wan"].generate(pipe)
            off[storage], kept[storage] = float((made - plain).norm() / plain.norm()), session.report().cache_bytes
            assert session.report().computed_fraction < 0.9
    assert 0.25 < kept["int8"] / kept["full"] < 0.5  # the tiny model's tokens have 24 values, for a scale each
    assert abs(off["int8"] - off["full"]) < 0.02 and off["int8"] != off["full"]


@given(st.integers(1, 5), st.integers(1, 7), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_a_packed_tensor_is_right_to_half_a_step(tokens: int, channels: int, size: float, seed: int) -> None:
    tensor = size * torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed))
    tensor[0, 0] = 0
    packed = Packed.of(tensor)
    step = tensor.abs().amax(-1, keepdim=True) / 127
    assert bool(((packed.unpacked() - tensor).abs() <= 0.5001 * step).all())
    assert sum(part.numel() * part.element_size() for part in packed.tensors) == Packed.bytes_of(tensor)


def test_a_processor_that_reshapes_values_is_not_folded() -> None:
    """CogVideoX views values by the head size of the keys: folded ones would be torn apart."""
    torch.manual_seed(0)
    module = FAMILIES["cogvideox"].build().transformer.transformer_blocks[0].attn1
    p = torch.linalg.qr(torch.randn(2, 16, 16))[0][..., :8]
    video, text = torch.randn(1, 12, 32), torch.randn(1, 4, 32)
    call: Any = (module.forward, (), {"hidden_states": video, "encoder_hidden_states": text})
    wanted = SlicedAttention(module, p, p)(*call)
    torch.testing.assert_close(SlicedAttention(module, p, p, True)(*call), wanted)


def test_an_unknown_processor_is_left_alone_and_reported() -> None:
    class Own:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    assert instrumented(Own(), lambda *a, **k: None) is None
    assert instrumented(types.SimpleNamespace(), lambda *a, **k: None) is None
    pipe = WAN.build()
    for block in pipe.transformer.blocks:
        block.attn1.processor = Own()
    session = unicp.accelerate(pipe, config_on("wan", "unicp-switch"))
    quietly(lambda: WAN.generate(pipe))
    assert "left unsliced, as their attention processor is not known: Own" in quietly(session.report).notes


def test_instrumenting_changes_neither_class_nor_processor() -> None:
    module = attention()
    before = copy.copy(module.processor.__dict__)
    call = type(module.processor).__call__
    twin = instrumented(module.processor, lambda attend, first, *qkv, **k: attend(*qkv, **k))
    assert type(module.processor).__call__ is call and module.processor.__dict__ == before
    assert isinstance(twin, type(module.processor))
    x = torch.randn(1, 6, 24)
    plain = module(x)
    module.processor = twin
    assert torch.equal(module(x), plain)


def test_ranks_need_a_measured_error_within_the_limit() -> None:
    table = {8: (0.5, 0.2, 0.4), 24: (0.09, 0.02, 0.08), 56: (0.001, 0.0, 0.001), 64: (0.0, 0.0, 0.0)}
    assert choose_ranks(table, 64, 0.1) is not None and choose_ranks(table, 64, 0.1).qk == 24  # type: ignore[union-attr]
    assert choose_ranks(table, 64, 0.01) is None  # 56 of 64 is more than three quarters
    assert choose_ranks(table, 64, 0) is None


# --- the config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta": -0.1}, "delta must be a number of at least 0, got -0.1"),
        ({"delta_cross": float("nan")}, "delta_cross must be a number"),
        ({"max_window": 0}, "max_window must be a whole number of at least 1, got 0"),
        ({"edcw": "offline"}, "unknown edcw 'offline'; known: profiled, online, off"),
        ({"dws": "mix"}, "unknown dws 'mix'"),
        ({"profile": 3}, "profile must be a Profile or the path of one, got 3"),
        ({"stack": PAPER.replace()}, "stack must be an AdaCacheConfig, a BudgetConfig or a ScheduleConfig"),
        ({"pcas": 1}, "pcas must be True or False, got 1"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnicpError, match=message):
        PAPER.replace(**fields)


# --- attention maps ---------------------------------------------------------------------------------------------------


def test_an_attention_map_makes_the_attention() -> None:
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    nowhere = torch.ones(5, 5, dtype=torch.bool).index_fill(0, torch.tensor(2), False)  # a query that looks at nothing
    for mask in (None, torch.rand(2, 1, 5, 5) > 0.3, torch.randn(2, 1, 5, 5), nowhere):
        for scale in (None, 0.1):
            expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
            torch.testing.assert_close(attention_map(query, key, mask, scale) @ value, expected)


def test_maps_of_one_step_serve_the_values_of_another() -> None:
    mapper = MapAttention(module := attention(), lambda size: True)
    assert mapper.works
    x, y = torch.randn(2, 6, 24), torch.randn(2, 6, 24)
    output, maps = mapper.compute(module.forward, (x, None, None, rotary(6)), {})
    torch.testing.assert_close(output, module(x, None, None, rotary(6)))
    again = mapper.reuse(module.forward, (x, None, None, rotary(6)), {}, maps)
    torch.testing.assert_close(again, output)
    # Of y only the values matter: they are those that y has in an ordinary run.
    value = captured(module, y, None, None, rotary(6))[2]
    expected = module.to_out[0]((maps[0] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mapper.reuse(module.forward, (y, None, None, rotary(6)), {}, maps), expected)


def test_maps_beyond_the_limit_are_not_kept_and_the_report_says_so() -> None:
    pipe = WAN.build()
    config = PAPER.replace(delta=0.05, delta_cross=0, map_level=True, map_bytes=4000)
    session = unicp.accelerate(pipe, config)
    latents = quietly(lambda: WAN.generate(pipe))
    report = quietly(session.report)
    assert "attention maps are kept up to map_bytes=4000; the others would not fit" in report.notes
    # 12 tokens, 2 heads: 1152 bytes a map, three of the six. Without a limit (12 maps, 2 of them being replaced): 6912.
    assert report.cache_bytes <= 3 * 1152 + 6 * 12 * 24 * 4
    assert bool(latents.isfinite().all())


def test_a_map_is_used_where_the_output_changed_too_much() -> None:
    policy = UniCPPolicy(PAPER.replace(delta=0.1, warmup_steps=1, cooldown_steps=0, max_window=2, map_level=True))
    policy.attach({"a": "temporal_attention"}, (), None)
    trace = []
    for index in range(8):
        step = Step(index=index, count=8, position=index, sigma=1 - index / 8)
        action = policy.decide(step).units.get("a", "compute")
        trace.append(action[0])
        if action == "compute":
            policy.observe_units(step, {"a": (1, 0.5 if index else None), "a/map": (1, 0.02 if index else None)})
    assert "".join(trace) == "ccmcmmcm"
