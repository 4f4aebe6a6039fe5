"""Floating-point operations: formulas against torch's own counter, and what is counted when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import unicp
from tests.tiny import FAMILIES
from unicp.engine.meter import Meter
from unicp.specs import find_spec
from unicp.tensors.flops import EXTRA, Counter, attention_operations, scoped

WAN = FAMILIES["wan"]


def heads(tokens: int, size: int = 8) -> torch.Tensor:
    return torch.randn(2, 3, tokens, size)


MASK = torch.ones(2, 1, 6, 9, dtype=torch.bool)
LAYERS: dict[str, tuple[Callable[[], Any], int]] = {
    "linear": (lambda: F.linear(torch.randn(2, 6, 4), torch.randn(5, 4), torch.randn(5)), 2 * 2 * 6 * 4 * 5),
    "embedding": (lambda: F.embedding(torch.tensor([1, 2]), torch.randn(4, 8)), 0),
    "patches": (
        lambda: F.conv3d(torch.randn(1, 4, 3, 8, 8), torch.randn(16, 4, 1, 2, 2), stride=(1, 2, 2)),
        2 * 16 * 16 * 48,
    ),
    "grouped convolution": (
        lambda: F.conv2d(torch.randn(1, 4, 8, 8), torch.randn(4, 1, 3, 3), padding=1, groups=4),
        2 * 4 * 9 * 64,
    ),
    "attention": (lambda: F.scaled_dot_product_attention(heads(6), heads(9), heads(9)), 2 * 2 * 2 * 3 * 6 * 9 * 8),
    "masked attention": (
        lambda: F.scaled_dot_product_attention(heads(6), heads(9), heads(9), attn_mask=MASK),
        2 * 2 * 2 * 3 * 6 * 9 * 8,
    ),
    "attention, values of another size": (
        lambda: F.scaled_dot_product_attention(heads(6), heads(9), heads(9, 4)),
        2 * 2 * 3 * 6 * 9 * (8 + 4),
    ),
    "linear attention": (lambda: heads(6) @ (heads(9).mT @ heads(9)), 2 * 2 * 3 * (9 + 6) * 8 * 8),
    "einsum": (lambda: torch.einsum("bhti,hij->bhtj", heads(6), torch.randn(3, 8, 4)), 2 * 2 * 3 * 6 * 8 * 4),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_hand_and_by_torch(name: str, inference: bool) -> None:
    run, expected = LAYERS[name]
    with torch.inference_mode(inference), torch.no_grad(), Counter() as counter:
        run()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=EXTRA) as theirs:
        run()
    assert counter.total == theirs.get_total_flops() == expected


def test_an_attention_kernel_of_another_library_counts_by_its_shapes() -> None:
    @torch.library.custom_op("unicp_test::my_flash_attn", mutates_args=())
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(query)

    with torch.no_grad(), Counter() as counter:
        attend(torch.randn(2, 10, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8))
    assert counter.total == attention_operations((2, 3, 10, 8), (2, 3, 5, 8), (2, 3, 5, 8)) > 0


def test_scopes_tell_what_a_module_did_and_leave_nothing() -> None:
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)
    whole = torch.nn.Sequential(first, second)
    counter = Counter()
    with torch.no_grad(), scoped(counter, [("first", first), ("all", whole), ("all", second)]), counter:
        whole(torch.randn(3, 4))
    assert counter.scopes == {"first": 2 * 3 * 16, "all": counter.total}
    assert counter.total == 2 * 3 * (16 + 32)
    assert not first._forward_hooks and not first._forward_pre_hooks and not whole._forward_hooks


def test_a_call_is_counted_once_for_each_branch_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    own = Meter.count

    def count(self: Meter, branch: str, run: Callable[[], Any]) -> Any:
        counted.append(branch)
        return own(self, branch, run)

    monkeypatch.setattr(Meter, "count", count)
    pipe = WAN.build()
    unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))
    WAN.generate(pipe)
    WAN.generate(pipe, seed=1)
    assert counted == ["cond", "uncond"]
    WAN.generate(pipe, size=48)
    assert counted == ["cond", "uncond"] * 2


def test_operations_by_kind_are_those_of_a_hand_calculation() -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))
    WAN.generate(pipe)
    meter = session._hooked[0].parts.meter
    cost = meter.cost("cond")
    tokens, width, mlp, text, layers = (
        3 * 2 * 2,
        24,
        32,
        8,
        3,
    )  # patches of 2 x 2 of 3 x 4 x 4
    attention = 4 * 2 * tokens * width * width + 4 * tokens * tokens * width
    cross = 2 * 2 * tokens * width * width + 2 * 2 * text * width * width + 4 * tokens * text * width
    kinds = cost.by_kind(meter.kinds)
    assert kinds["self_attention"] == layers * attention
    assert kinds["cross_attention"] == layers * cross
    assert kinds["mlp"] == layers * 2 * 2 * tokens * width * mlp
    assert sum(kinds.values()) == cost.total
    assert cost.stack == cost.total - kinds["rest"]


def test_attention_whose_kernel_is_unknown_is_noted() -> None:
    pipe = WAN.build()

    class Silent:
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            return attn.to_out[0](attn.to_v(hidden_states))

    for block in pipe.transformer.blocks:
        block.attn1.processor = Silent()
    session = unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))
    WAN.generate(pipe)
    assert any("operations of attention were not counted" in note for note in session.report().notes)
    unicp.restore(pipe)
    assert not any("not counted" in note for note in Meter(pipe.transformer, find_spec(pipe.transformer)).notes)


def test_products_are_counted_as_torch_counts_them() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    products = (
        lambda: a.bmm(b),
        lambda: a[0].mm(b[0]),
        lambda: torch.addmm(torch.zeros(6), a[0], b[0]),
        lambda: torch.einsum("bij,bjk->bik", a, b),
    )
    for product in products:
        with Counter() as ours, FlopCounterMode(display=False) as theirs:
            product()
        assert ours.total == theirs.get_total_flops() > 0
