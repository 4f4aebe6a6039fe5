"""Fills: exact on the series they are made for, and plain reuse where nothing else is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unicp.offline.pretend import Pretend
from unicp.tensors.extrapolation import ORDERS, extrapolate, firmness, reach, steadiness, weights

SIGMAS = [0.93, 0.71, 0.64, 0.38, 0.05]  # unevenly spaced

nodes = st.lists(st.integers(0, 1000), min_size=1, max_size=3, unique=True).map(lambda n: [v / 1000 for v in n])


@pytest.mark.parametrize("target", [0.6, 0.33, 0.0, 1.0])
@pytest.mark.parametrize(("order", "name"), [(0, "reuse"), (1, "linear"), (2, "quadratic")])
def test_exact_on_polynomials_of_its_degree(order: int, name: str, target: float) -> None:
    assert ORDERS[name] == order
    coefficients = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-4.0, 3.0]], dtype=torch.float64)

    def value(sigma: float, degree: int) -> torch.Tensor:
        return sum(coefficients[d] * sigma**d for d in range(degree + 1))  # type: ignore[return-value]

    known = SIGMAS[:2] + [SIGMAS[3]]
    points = known[: order + 1]
    found = extrapolate([value(s, order) for s in points], weights(points, target))
    torch.testing.assert_close(found, value(target, order), rtol=1e-9, atol=1e-9)
    if order < 2:  # and not on the next degree: the target is off its curve
        found = extrapolate([value(s, order + 1) for s in points], weights(points, target))
        assert (found - value(target, order + 1)).abs().max() > 1e-3


@settings(max_examples=100, deadline=None)
@given(sigmas=nodes, target=st.floats(0, 1), damping=st.floats(0, 1))
def test_weights_sum_to_one(sigmas: list[float], target: float, damping: float) -> None:
    assume(min((abs(a - b) for a in sigmas for b in sigmas if a != b), default=1) > 0.01)
    found = weights(sigmas, target, damping)
    assert len(found) == len(sigmas)
    assert sum(found) == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(sigmas=nodes, target=st.floats(0, 1))
def test_damping_zero_is_reuse_beyond_the_spacing_of_the_nodes(sigmas: list[float], target: float) -> None:
    assume(reach(sigmas, target) > 1 + 1e-6)
    assert weights(sigmas, target, 0.0) == [1.0] + [0.0] * (len(sigmas) - 1)


def test_damping_is_between() -> None:
    full, half = weights([0.5, 0.7], 0.1), weights([0.5, 0.7], 0.1, 0.5)
    assert full == [3.0, -2.0]
    assert half == [2.0, -1.0]
    assert weights([0.5, 0.7], 0.3, 0.5) == [2.0, -1.0]  # no further than the nodes are apart


@settings(max_examples=200, deadline=None)
@given(spacing=st.floats(1e-4, 1), distance=st.floats(0, 1))
def test_no_forecast_reaches_without_bound(spacing: float, distance: float) -> None:
    """Where sigmas are uneven an undamped one has weights in the hundreds."""
    assert abs(weights([1.0, 1.0 + spacing], 1.0 - distance, 0.85)[1]) < 2.7
    assert abs(weights([1.0, 1.0 + spacing, 1.0 + 2 * spacing], 1.0 - distance, 0.85)[1]) < 15


def test_steadiness_of_changes() -> None:
    ahead, aside = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    nothing = torch.zeros(1, 2)
    assert float(steadiness(2 * ahead, ahead, nothing)) == 1
    assert float(steadiness(nothing, ahead, nothing)) == 0  # it goes back
    assert float(steadiness(ahead + aside, ahead, nothing)) == 0  # it turns off
    assert float(steadiness(1.25 * ahead + aside, ahead, nothing)) == pytest.approx(2 * 0.25 / 1.0625**0.5)
    assert float(steadiness(ahead, ahead, ahead)) == 0  # no change tells nothing
    assert float(steadiness(ahead * float("nan"), ahead, nothing)) == 0
    both = steadiness(torch.cat([2 * ahead, aside]), torch.cat([ahead, ahead]), torch.cat([nothing, nothing]))
    assert both.shape == (2, 1) and both.flatten().tolist() == [1, 0]


@settings(max_examples=200, deadline=None)
@given(left=st.floats(1e-3, 1), own=st.floats(0, 1), newest=st.floats(0, 3), seen=st.floats(0, 1))
def test_a_correction_leaves_no_more_than_was_there(left: float, own: float, newest: float, seen: float) -> None:
    """Whatever part of an error the denoiser sees, from none of it to all of it (dv/dx = seen / sigma)."""
    firm = firmness(own * left, left, newest * left)
    assert 0 < firm <= 1
    alone = 1 - own * seen
    assert abs(alone - firm * (1 + newest * seen)) <= 1 + 1e-9


def test_at_a_known_point_it_is_that_value() -> None:
    assert weights([0.5, 0.7, 0.9], 0.7) == [0.0, 1.0, 0.0]


def test_plain_reuse_is_the_value_itself() -> None:
    value = torch.randn(3)
    assert extrapolate([value], [1.0]) is value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_wide_and_come_back_narrow(dtype: torch.dtype) -> None:
    values = [torch.full((4,), v).to(dtype) for v in (1000.0, 999.0, 998.0)]
    kept = [v.clone() for v in values]
    found = extrapolate(values, [3.0, -3.0, 1.0])
    assert found.dtype == dtype
    expected = sum(f * v.double() for f, v in zip((3, -3, 1), values, strict=True)).to(dtype)  # type: ignore[union-attr]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True)), "the inputs are not touched"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("newest", [-0.3, 1.0, 1.5, 2.7])
def test_a_line_is_as_exact_as_a_wide_sum(dtype: torch.dtype, newest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(10_000, generator=generator).to(dtype)
    last = (before.double() + 0.1 * torch.randn(10_000, generator=generator).double()).to(dtype)
    found = extrapolate([last, before], [newest, 1 - newest])
    expected = newest * last.double() + (1 - newest) * before.double()
    assert torch.equal(extrapolate([last, before], [1.0, 0.0]), last)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps * expected.abs() + torch.finfo(torch.float32).eps * 8
    assert bool(((found.double() - expected).abs() <= rounding).all())


def test_a_line_makes_no_copy_but_itself() -> None:
    device = Pretend()
    with torch.no_grad(), device:
        last, before = (torch.empty(1000, dtype=torch.bfloat16, device="meta") + 1 for _ in range(2))
        held = device.memory.now
        device.mark()
        found = extrapolate([last, before], [1.5, -0.5])
    assert found.dtype == torch.bfloat16
    assert device.memory.peak - held == 2000


def test_every_value_has_its_weight() -> None:
    with pytest.raises(ValueError):
        extrapolate([torch.ones(2), torch.ones(2)], [1.0])
