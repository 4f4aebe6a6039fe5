"""A run without a host: loops of one's own, policies of one's own, and profiles that are passed on as objects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import unicp
from tests.contract import actions, quietly
from tests.tiny import FAMILIES
from unicp import BudgetConfig, Profile, Run, ScheduleConfig, UnicpError
from unicp.policies.config import _REGISTRY
from unicp.profiles import content_of

DOCS = Path(__file__).parent.parent / "docs"
WAN = FAMILIES["wan"]
SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2]


def blocks_of(page: str) -> list[str]:
    """The Python in a page of the docs."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(unicp.demo.path(), dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("config", [BudgetConfig(target_speedup=1), ScheduleConfig(interval=1)], ids=lambda c: c.method)
def test_a_plan_that_skips_nothing_keeps_nothing(config: unicp.Config) -> None:
    pipe = WAN.build()
    plain = WAN.generate(pipe, steps=6)
    session = unicp.accelerate(pipe, config)
    assert torch.equal(quietly(lambda: WAN.generate(pipe, steps=6)), plain)
    assert session.report().cache_bytes == 0


@pytest.mark.parametrize(
    "config",
    [ScheduleConfig(compute=(0, 1, 3, 5, 8, 9, 10, 11)), BudgetConfig(target_speedup=1.3, cooldown_steps=3)],
    ids=lambda c: c.method,
)
def test_nothing_is_kept_beyond_the_last_filled_step(config: unicp.Config) -> None:
    held: list[int] = []
    run = Run(config, [1 - i / 12 for i in range(12)], weights=None)
    for step in range(12):
        run.step(step, "cond", lambda step=step: torch.full((1, 4), float(step)))
        held.append(sum(t.numel() for t in run.tensors()))
    done = [record.action for record in run.report().steps]
    filled = max(i for i, action in enumerate(done) if action != "compute")
    assert filled < 10
    assert all(held[: filled + 1]) and not any(held[filled + 1 :]), (done, held)


@pytest.mark.parametrize(
    "config", [BudgetConfig(target_speedup=2), ScheduleConfig(interval=2, fill="linear")], ids=lambda c: c.method
)
def test_a_loop_of_ones_own_does_what_the_pipeline_does(
    pipe: WanPipeline, config: unicp.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, seed = pipe.transformer.config.in_channels, torch.Generator().manual_seed(0)
    latents = pipe.prepare_latents(1, channels, 48, 48, 5, torch.float32, "cpu", seed)
    call = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 12, "guidance_scale": 4.0}
    with unicp.accelerate(pipe, config) as session:
        made = pipe("a red square moves right", latents=latents.clone(), output_type="latent", **call).frames
        wanted = session.report()

    namespace: dict[str, Any] = {}
    exec(blocks_of("own-loop.md")[0], namespace)
    monkeypatch.setattr(unicp, "BudgetConfig", lambda **_: config)
    cond, uncond = pipe.encode_prompt("a red square moves right", device="cpu", max_sequence_length=512)

    def denoiser(latents: Any, sigma: float, embeds: Any) -> Any:
        timestep = torch.full((1,), 1000.0 * sigma)
        return pipe.transformer(latents, timestep, embeds, return_dict=False)[0]

    with torch.no_grad():
        ends, report = namespace["sample"](denoiser, latents, pipe.scheduler.sigmas.tolist(), cond, uncond)
    mine = [(r.index, r.branch, r.action, pytest.approx(r.sigma)) for r in report.steps]
    assert [(r.index, r.branch, r.action, r.sigma) for r in wanted.steps] == mine
    assert report.computed_steps == wanted.computed_steps < 12
    assert report.notes == wanted.notes
    torch.testing.assert_close(ends, made, rtol=1e-3, atol=1e-3)


def test_a_run_frees_what_it_kept_at_its_last_step() -> None:
    run = Run(ScheduleConfig(interval=2, fill="linear"), SIGMAS)
    held = []
    for index in range(len(SIGMAS)):
        for branch in ("cond", "uncond"):
            run.step(index, branch, lambda: {"sample": torch.ones(2, 3)})
        held.append(len(run.tensors()))
    assert held == [2, 4, 4, 4, 0]
    assert run.report().complete


def test_what_is_kept_is_nobody_elses_to_write_into() -> None:
    """Loops scale outputs in place, and denoisers that replay a graph overwrite the buffer of the call before."""
    buffer = torch.ones(1, 4)
    run = Run(ScheduleConfig(interval=2, warmup_steps=1), SIGMAS)
    first = run.step(0, "cond", lambda: buffer)
    first.mul_(7)
    buffer.fill_(9)
    filled = run.step(1, "cond", lambda: pytest.fail("this step is filled"))
    assert torch.equal(filled, torch.ones(1, 4))
    filled.mul_(5)
    assert all(torch.equal(kept, torch.ones(1, 4)) for kept in run.tensors())


def test_what_computes_is_called_only_where_it_is_decided_and_outputs_come_back_as_they_are() -> None:
    run, called = Run(ScheduleConfig(interval=2, warmup_steps=1), SIGMAS), []
    for index in range(len(SIGMAS)):
        output = run.step(index, "cond", lambda i=index: called.append(i) or (torch.full((2,), float(i)), None))
        assert output[1] is None and float(output[0][0]) == index - index % 2
        output[0].zero_()  # what a loop does to its outputs is no matter
    assert called == [0, 2, 4]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Run(unicp.AdaCacheConfig(), SIGMAS), "adacache looks into the blocks"),
        (lambda: Run(unicp.UniCPConfig(), SIGMAS), "unicp looks into the blocks"),
        (lambda: Run(BudgetConfig(profile="x.safetensors"), SIGMAS), "a Run takes no profile"),
        (lambda: Run(BudgetConfig(), SIGMAS[::-1]), "sigmas must be the noise levels of all steps, falling"),
        (lambda: Run(BudgetConfig(), []), "sigmas must be"),
        (lambda: Run(BudgetConfig(), [1.0, float("nan"), 0.1]), "sigmas must be"),
        (lambda: Run(BudgetConfig(), [float("inf"), *SIGMAS]), "sigmas must be"),
        (
            lambda: Run(BudgetConfig(), SIGMAS, weights=[float("nan"), 1, 1, 1, 1]),
            "weights must be finite numbers, got",
        ),
        (lambda: Run(BudgetConfig(), SIGMAS, weights=[0.1]), "weights must be one a step: 5 steps, got 1"),
    ],
)
def test_what_a_run_cannot_do_is_said_before_it_begins(make: Any, said: str) -> None:
    with pytest.raises(UnicpError, match=said):
        make()


def test_steps_come_in_order_and_branches_once() -> None:
    run = Run(ScheduleConfig(interval=2), SIGMAS)
    run.step(0, "cond", lambda: torch.ones(1))
    with pytest.raises(UnicpError, match="step 0 has had its branch 'cond'"):
        run.step(0, "cond", lambda: torch.ones(1))
    run.step(2, "cond", lambda: torch.ones(1))
    with pytest.raises(UnicpError, match="step 1 is over; a Run is one video"):
        run.step(1, "cond", lambda: torch.ones(1))
    with pytest.raises(UnicpError, match="this run has the steps 0 to 4, got 5"):
        run.step(5, "cond", lambda: torch.ones(1))


@pytest.mark.parametrize("fill", ["reuse", "linear"])
def test_a_branch_that_was_not_asked_for_at_the_step_before_is_computed(fill: str) -> None:
    """Guidance at every other step, or between two noise levels."""
    run = Run(ScheduleConfig(compute=(0, 1), fill=fill), [1 - i / 12 for i in range(12)])
    for index in range(12):
        run.step(index, "cond", lambda: torch.ones(1))
        if index not in (3, 4, 8):
            run.step(index, "uncond", lambda: torch.ones(1))
    mark = "~" if fill == "linear" else "."
    report = run.report()
    assert report.timeline() == {"cond": "##" + 10 * mark, "uncond": f"##{mark}#..#.."}
    assert not any("left out" in note for note in report.notes)


def test_steps_that_a_loop_leaves_out_are_said() -> None:
    run = Run(BudgetConfig(target_speedup=2), [1 - i / 20 for i in range(20)])
    for index in range(0, 20, 2):
        run.step(index, "cond", lambda: torch.ones(1))
    report = run.report()
    assert report.timeline() == {"cond": 10 * "#"}
    assert any("the loop left out steps of this run" in note for note in report.notes)


def test_a_policy_of_ones_own() -> None:
    namespace: dict[str, Any] = {}
    define, use = blocks_of("own-policy.md")
    try:
        exec(define, namespace)
        pipe = namespace["pipe"] = WAN.build()
        exec(use, namespace)
        quietly(lambda: WAN.generate(pipe))
        report = namespace["session"].report()
        assert report.method == "patient"
        exec(use.replace("0.2", "1e9"), namespace)
        WAN.generate(pipe)
        skipped = [r.index for r in namespace["session"].report().steps if r.action == "forecast"]
        assert skipped and set(skipped) <= set(range(2, 9))
        exec(use.replace("0.2", "0.0"), namespace)
        with pytest.warns(unicp.UnicpWarning, match=r"no forecast was better than limit=0\.0"):
            WAN.generate(pipe)
    finally:
        _REGISTRY.pop(namespace.get("PatientConfig"), None)  # type: ignore[arg-type]


def test_a_profile_is_read_once_and_serves_as_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = WAN.build()
    config = unicp.UniCPConfig(delta=0.5, delta_prune=0.9)
    made = WAN.run(pipe, lambda run, **call: unicp.calibrate(run, None, config=config, progress=False, **call))
    fresh = made.config.replace(profile=made)
    with pytest.raises(UnicpError, match="once the profile is saved"):
        fresh.to_json()
    read: list[Any] = []
    load = Profile.load
    monkeypatch.setattr(Profile, "load", classmethod(lambda cls, path: read.append(path) or load(path)))

    def ends(config: Any) -> tuple[Any, Any]:
        with unicp.accelerate(pipe, config) as session:
            latents = WAN.generate(pipe)
            return latents, actions(session.report())

    by_object = [ends(made), ends(fresh)]
    assert not read
    made.save(path := tmp_path / "p.safetensors")
    assert made.path == str(path)
    by_path = [ends(config.replace(profile=path))]
    assert len(read) == 1
    ends(config.replace(profile=path, stack=unicp.AdaCacheConfig()))
    assert len(read) == 2
    for latents, done in (*by_object[1:], *by_path):
        assert torch.equal(latents, by_object[0][0]) and done == by_object[0][1]
    assert content_of(fresh) == content_of(config.replace(profile=path))
    assert fresh.to_dict()["profile"] == str(path)
