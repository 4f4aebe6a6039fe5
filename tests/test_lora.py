"""LoRA adapters, by diffusers and peft: put on, fused and taken off again, before acceleration and after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import unicp
from tests.contract import actions, case, config_on, plain, quietly
from tests.tiny import FAMILIES

pytest.importorskip("peft", reason="needs peft, which the dev extra brings")

WAN = FAMILIES["wan"]
NAMES = ("adacache-residual", "schedule-stack", "unicp-online", "unicp-switch")
QUICK = {
    "adacache-residual": ("load-disable-enable-unload", "add-adapter"),
    "unicp-switch": ("load-fuse-unfuse-unload", "baked"),
}
"""Hooks on blocks, and on units whose weights are sliced: the others have their hooks where one of these has."""


def _lora(transformer: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """An adapter of rank 4 on the attention and the MLPs of all blocks, as a file of weights holds it."""
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            found[f"transformer.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=draw) * 0.2
            found[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=draw) * 0.2
    return found


def _load(pipe: Any, seed: int = 0, name: str = "one") -> None:
    pipe.load_lora_weights(_lora(pipe.transformer, seed), adapter_name=name)


def _bake(pipe: Any) -> None:
    """The usual way to make an adapter cost nothing; afterwards every module is what it was, with other weights."""
    _load(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _add(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False), adapter_name="one"
    )


def _second(pipe: Any) -> None:
    # Beside it: peft looks for the modules by their old names.
    pipe.load_lora_weights(SECOND, adapter_name="two")
    pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 0.8])


SECOND = _lora(WAN.build().transformer, seed=1)

# What is done to a pipeline, one after the other, with a video after each.
LIVES: dict[str, list[Callable[[Any], None]]] = {
    "load-disable-enable-unload": [
        _load,
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ],
    "load-fuse-unfuse-unload": [
        _load,
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ],
    "load-another-fuse": [_load, _second, lambda pipe: pipe.fuse_lora(lora_scale=0.7)],
    "baked": [_bake],
    "add-adapter": [_add, lambda pipe: pipe.transformer.delete_adapters("one")],
}


@pytest.mark.parametrize(
    ("name", "life"),
    [
        pytest.param(name, life, marks=() if life in QUICK.get(name, ()) else pytest.mark.slow)
        for name in NAMES
        for life in LIVES
    ],
)
def test_before_or_after(name: str, life: str) -> None:
    """After every event: what was accelerated from the beginning makes what one makes that was accelerated just now,
    and computing everything makes what the unaccelerated pipeline makes, bit for bit."""
    config, always = config_on("wan", name), case(name).always_compute
    early, late = WAN.build(), WAN.build()
    session = unicp.accelerate(early, config)
    start = WAN.generate(early)
    for number, event in enumerate(LIVES[life]):
        event(early)
        event(late)
        unaccelerated = WAN.generate(late)
        assert bool(unaccelerated.isfinite().all())
        if number == 0:
            assert not torch.allclose(unaccelerated, plain("wan"), rtol=0.1, atol=0.1), "the adapter does nothing"
        with unicp.accelerate(late, always):
            assert torch.equal(quietly(lambda: WAN.generate(late)), unaccelerated)
        with unicp.accelerate(late, config) as fresh:
            expected = WAN.generate(late)
            assert torch.equal(WAN.generate(early), expected)
            assert actions(session.report()) == actions(fresh.report())
            assert not torch.equal(expected, unaccelerated)
        assert torch.equal(WAN.generate(late), unaccelerated)
    if life == "load-disable-enable-unload":  # (others leave rounding errors, or an empty adapter)
        assert torch.equal(WAN.generate(early), start)
    session.restore()
    assert torch.equal(WAN.generate(early), WAN.generate(late))


def test_weights_that_change_behind_torch_are_sliced_anew() -> None:
    """The weights that a slice is made of are read when a video begins: also those that were written past torch's own
    count of changes, as fusing an adapter does."""
    pipe = WAN.build()
    unicp.accelerate(pipe, config_on("wan", "unicp-switch"))
    WAN.generate(pipe)
    value = pipe.transformer.blocks[0].attn1.to_v
    version = value.weight._version
    value.weight.data.mul_(1.5)
    assert value.weight._version == version
    late = WAN.build()
    late.transformer.blocks[0].attn1.to_v.weight.data.mul_(1.5)
    unicp.accelerate(late, config_on("wan", "unicp-switch"))
    assert torch.equal(WAN.generate(pipe), WAN.generate(late))
