"""What else people do to a model, before or after it is accelerated: the order makes no difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

import unicp
from tests.contract import actions, case, config_on, covering, plain, quietly
from tests.tiny import FAMILIES

WAN = FAMILIES["wan"]


def _float8(transformer: Any) -> None:
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _channels_last(transformer: Any) -> None:
    transformer.to(memory_format=torch.channels_last_3d)


def _backend(transformer: Any) -> None:
    transformer.set_attention_backend("_native_math")


def _checkpointing(transformer: Any) -> None:
    transformer.enable_gradient_checkpointing()


def _int8(transformer: Any) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    torchao.quantize_(transformer, torchao.Int8WeightOnlyConfig())


def _to(dtype: torch.dtype) -> Callable[[Any], None]:
    return lambda transformer: transformer.to(dtype)


CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "bfloat16": (_to(torch.bfloat16), True),
    "float16": (_to(torch.float16), True),
    "float8": (_float8, True),
    "channels-last": (_channels_last, False),
    "attention-backend": (_backend, False),
    "gradient-checkpointing": (_checkpointing, False),
    "torchao-int8": (_int8, True),
}
"""How, and whether the result is meant to be another."""


@pytest.fixture(autouse=True)
def own_attention_backend() -> Iterator[None]:
    """Choosing a backend for one model makes it diffusers' default for all later ones."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    yield
    attention_dispatch._AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize(
    ("change", "name"), covering(CHANGES, ["adacache-residual", "schedule-linear", "unicp-online", "unicp-switch"])
)
def test_before_or_after(change: str, name: str) -> None:
    apply, differs = CHANGES[change]
    made = []
    for first in (True, False):
        pipe = WAN.build()
        if first:
            apply(pipe.transformer)
        session = unicp.accelerate(pipe, config_on("wan", name))
        if not first:
            apply(pipe.transformer)
        latents = quietly(lambda pipe=pipe: WAN.generate(pipe))
        assert bool(latents.isfinite().all())
        assert any(record.action != "compute" for record in session.report().steps)
        made.append((latents, actions(session.report())))
        session.restore()
        restored = WAN.generate(pipe)
        if differs:
            assert not torch.equal(restored, plain("wan"))
        else:
            torch.testing.assert_close(restored, plain("wan"), rtol=1e-4, atol=1e-4)
    assert torch.equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    pipe = WAN.build()
    apply(pipe.transformer)
    expected = WAN.generate(pipe)
    unicp.accelerate(pipe, case(name).always_compute)
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), expected)
