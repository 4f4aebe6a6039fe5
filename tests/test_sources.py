"""May this be filled from that? The same branch, inputs and weights, no older than the last step, our hooks there."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from peft import LoraConfig

import unicp
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp.engine.fills.units import _ours
from unicp.engine.sources import DOUBTFUL, STALE, USABLE, Sources

WAN = FAMILIES["wan"]
LINEAR = unicp.ScheduleConfig(interval=3, fill="linear")
BUDGET = unicp.BudgetConfig(target_speedup=2, leap=0.0)
UNITS = unicp.UniCPConfig(delta=1e9, max_window=4, pcas=False)
STACK = unicp.AdaCacheConfig(codebook=((1e9, 3),))
NEW = 3 * torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(77))


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def actions_at(report: unicp.SessionReport, index: int) -> dict[str, str]:
    return {record.branch: record.action for record in report.steps if record.index == index}


def watch() -> tuple[Sources, list[str]]:
    said: list[str] = []
    sources = Sources(torch.nn.Linear(2, 2), "x", ["t"], said.append)
    sources.begin()
    return sources, said


# --- by identity and version ------------------------------------------------------------------------------------------


def test_a_prompt_is_known_by_where_it_lies_and_how_often_it_was_written_to() -> None:
    sources, said = watch()
    prompt, scale = torch.randn(2, 3), 1.5
    look = lambda i, p, s: sources.look("cond", i, {"x": torch.randn(4), "t": i, "p": p, "s": s}, False)  # noqa: E731
    assert [look(i, prompt, scale) for i in range(4)] == [USABLE] * 4
    assert look(4, prompt[:], scale) == USABLE  # another tensor, the same memory
    prompt.mul_(2)
    assert look(5, prompt, scale) == STALE
    assert look(6, prompt, scale) == STALE  # until what was kept is dropped
    sources.renewed("cond")
    assert look(7, prompt, scale) == USABLE
    assert look(8, prompt, 0.5) == STALE
    assert len(said) == 2 and "(p)" in said[0] and "(s)" in said[1]


def test_what_is_made_anew_at_every_call_is_no_change() -> None:
    sources, said = watch()
    look = lambda i, p: sources.look("cond", i, {"x": torch.randn(4), "t": i, "p": p}, False)  # noqa: E731
    assert [look(i, torch.ones(3)) for i in range(6)] == [USABLE, DOUBTFUL, USABLE, USABLE, USABLE, USABLE]
    assert not said


def test_two_values_that_take_turns_are_not_made_anew() -> None:
    prompts = torch.ones(3), torch.ones(3)
    for first in (prompts[0], torch.ones(3)):  # in a pipeline's callback they begin with the second call
        sources, said = watch()
        found = []
        for i in range(7):
            prompt = prompts[i % 2] if i else first
            found.append(sources.look("cond", i, {"x": torch.randn(4), "t": i, "p": prompt}, False))
            sources.renewed("cond")
        assert found == [USABLE, DOUBTFUL, STALE if first is prompts[0] else USABLE, STALE, STALE, STALE, STALE]
        assert set(said) and "(p)" in said[0]


def test_a_change_at_the_second_call_is_seen_at_the_third() -> None:
    sources, said = watch()
    first, second = torch.ones(3), torch.ones(3)
    look = lambda i, p: sources.look("cond", i, {"x": torch.randn(4), "t": i, "p": p}, False)  # noqa: E731
    assert [look(0, first), look(1, second), look(2, second)] == [USABLE, DOUBTFUL, STALE]
    assert len(said) == 1


def test_a_branch_that_was_not_called_at_a_step() -> None:
    sources, _ = watch()
    look = lambda branch, i: sources.look(branch, i, {"x": torch.randn(4), "t": i}, False)  # noqa: E731
    assert [look("uncond", 0), look("uncond", 1), look("cond", 2), look("uncond", 3)] == [USABLE, USABLE, USABLE, STALE]


def test_the_same_latents_again() -> None:
    sources, said = watch()
    x = torch.randn(4)
    look = lambda i, leaping: sources.look("cond", i, {"x": x, "t": i, "p": NEW}, leaping)  # noqa: E731
    assert [look(0, True), look(1, True)] == [USABLE, USABLE]  # a solver that has gone beyond a step gives them back
    assert look(2, False) == STALE and len(said) == 1
    x.mul_(0.9)  # a static buffer that was written to
    sources.renewed("cond")
    assert look(3, False) == USABLE


def test_weights_by_their_version_counters() -> None:
    said: list[str] = []
    layer = torch.nn.Linear(2, 2)
    sources = Sources(layer, "x", ["t"], said.append)
    sources.begin()
    sources.look("cond", 0, {"x": torch.randn(4), "t": 0}, False)
    assert not sources.weights_changed()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert sources.weights_changed() and not sources.weights_changed()
    assert sources.look("cond", 1, {"x": torch.randn(4), "t": 1}, False) == STALE and said


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LINEAR, BUDGET, STACK], ids=["linear", "budget", "stack"])
def test_guidance_that_is_off_for_a_while(config: Any) -> None:
    """No unconditional branch at steps 5 to 12: at 13 there is nothing that could stand in for it."""

    def interval(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        pipe._guidance_scale = 1.0 if 5 <= i + 1 < 13 else 4.0
        return tensors

    pipe = WAN.build()
    plain = WAN.generate(pipe, steps=24, callback=interval)
    session = unicp.accelerate(pipe, config)
    out = quietly(lambda: WAN.generate(pipe, steps=24, callback=interval))
    (report,) = session.reports
    assert actions_at(report, 13)["uncond"] == "compute"
    assert off(out, plain) < 0.1
    assert not session.cached_tensors()


CONFIGS = {
    "schedule": unicp.ScheduleConfig(compute=(0, 1, 5, 9, 14, 19), fill="linear"),
    "stack": unicp.ScheduleConfig(compute=(0, 1, 5, 9, 14, 19), unit="stack"),
    "units": UNITS,
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_prompt_that_a_callback_changes(config: Any, in_place: bool) -> None:
    """After step 9. The unconditional branch goes on as it was."""

    def change(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        if i == 9 and in_place:
            tensors["prompt_embeds"].copy_(NEW)
        elif i == 9:
            tensors["prompt_embeds"] = NEW
        return tensors

    def video(pipe: Any) -> Any:
        call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        generator = torch.Generator().manual_seed(0)
        return WAN.run(pipe, lambda p, **k: p(**call, **k).frames, steps=20, generator=generator)

    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    quietly(lambda: video(pipe))
    report = session.report()
    assert actions_at(report, 10)["cond"] == "compute"
    assert any("(encoder_hidden_states)" in note for note in report.notes)
    if config is not UNITS:
        assert actions_at(report, 10)["uncond"] != "compute"


def adapted() -> Any:
    pipe = WAN.build()
    torch.manual_seed(3)
    adapter = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    pipe.transformer.add_adapter(adapter, adapter_name="one")
    return pipe


def weigh(transformer: Any) -> None:
    transformer.set_adapters(["one"], weights=[0.0])


def write(transformer: Any) -> None:
    with torch.no_grad():
        transformer.blocks[1].ffn.net[2].weight.mul_(0.5)


CHANGES = {
    "weighed": weigh,
    "disabled": lambda transformer: transformer.disable_adapters(),
    "deleted": lambda transformer: transformer.delete_adapters("one"),
    "fused": lambda transformer: transformer.fuse_lora(),
    "written": write,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_in_the_middle_of_a_run(change: Any) -> None:
    """After step 9: what was kept is of another model."""
    pipe = adapted()

    def callback(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        if i == 9:
            change(pipe.transformer)
        return tensors

    session = unicp.accelerate(pipe, CONFIGS["schedule"])
    quietly(lambda: WAN.generate(pipe, steps=20, callback=callback))
    report = session.report()
    assert set(actions_at(report, 10).values()) == {"compute"}
    assert actions_at(report, 11)["cond"] != "compute"
    assert any("weights or adapters changed" in note for note in report.notes)


def test_weights_that_stay_say_nothing() -> None:
    pipe = adapted()
    session = unicp.accelerate(pipe, CONFIGS["schedule"])
    quietly(lambda: WAN.generate(pipe, steps=20))
    assert session.report().notes == () and session.report().computed_steps == 6


# --- our hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_blocks_whose_forward_others_replace(which: str) -> None:
    """As diffusers' community pipelines with perturbed guidance do, at each step."""
    pipe, twin = WAN.build(), WAN.build()
    plain = WAN.generate(twin, steps=20)
    ran: list[int] = []
    blocks = list(pipe.transformer.blocks)
    for block in blocks:
        block.ffn.register_forward_pre_hook(lambda *_: ran.append(1))
    chosen = {"all": blocks, "first": blocks[:1], "last": blocks[-1:]}[which]

    def replace(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        for block in chosen:
            block.forward = types.MethodType(type(block).forward, block)
        return tensors

    session = unicp.accelerate(pipe, STACK)
    out = quietly(lambda: WAN.generate(pipe, steps=20, callback=replace))
    report = quietly(session.report)
    assert torch.equal(out, plain) and len(ran) >= 120
    assert report.estimated_speedup == 1 and any("hooks on blocks" in note for note in report.notes)


def test_what_is_kept_of_units_is_a_copy() -> None:
    """CUDA graphs and static buffers give out the same memory at every step."""
    output = torch.ones(2, 3)
    kept = _ours(output)
    output.zero_()
    assert bool(kept.eq(1).all())


def test_static_buffers_inside_of_the_model_do_no_harm() -> None:
    def static(pipe: Any) -> Any:
        for block in pipe.transformer.blocks:
            buffers: dict[Any, Any] = {}

            def into(module: Any, args: Any, output: Any, buffers: dict[Any, Any] = buffers) -> Any:
                buffer = buffers.setdefault(output.shape, torch.empty_like(output))
                return buffer.copy_(output)

            block.attn1.register_forward_hook(into)
            block.ffn.register_forward_hook(into)
        return pipe

    config = unicp.UniCPConfig(delta=0.5, delta_mlp=0.5, max_window=3, pcas=False)
    wanted, found = WAN.build(), WAN.build()
    sessions = [unicp.accelerate(pipe, config) for pipe in (wanted, found)]
    static(found)
    videos = [quietly(lambda pipe=pipe: WAN.generate(pipe, steps=12)) for pipe in (wanted, found)]
    assert torch.equal(*videos)
    assert sessions[0].report().computed_fraction < 0.9
