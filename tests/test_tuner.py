"""What a tuning runs, refuses and keeps, beside the plans that come out of it (tests/test_budget.py)."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

import unicp
from tests.test_budget import interrupt, tuned
from tests.tiny import FAMILIES
from unicp import BudgetConfig, Profile
from unicp.errors import UnicpError
from unicp.offline import candidates, trials
from unicp.profiles.identity import identity

WAN = FAMILIES["wan"]


def tuned_on(prompts: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Profile:
    """On so many prompts, of which all have the same embeddings, as the tiny pipeline has no text encoder."""
    own, embeds = trials.Tuner.arguments, {}

    def run(pipe: Any, **call: Any) -> Profile:
        embeds.update({name: call.pop(name) for name in list(call) if "embeds" in name})
        return unicp.tune(pipe, list(prompts), progress=False, **{**call, **more})

    with monkeypatch.context() as patch:
        patch.setattr(trials.Tuner, "arguments", lambda self, i: {**own(self, i), "prompt": None, **embeds})
        profile: Profile = WAN.run(WAN.build(), run)
    return profile


@pytest.mark.usefixtures("by_steps")
def test_a_pipeline_that_steps_a_copy_of_its_scheduler_too_is_tuned() -> None:
    """LTX-2 has sound beside the video, and a copy of the scheduler for it."""
    pipe = FAMILIES["ltx2"].build()
    assert len(tuned("ltx2", pipe, steps=6).metadata["budget"]["sigmas"]) == 6
    assert "step" not in vars(pipe.scheduler)


def test_a_pipeline_that_steps_nothing_but_copies_is_refused() -> None:
    with pytest.raises(UnicpError, match="steps copies of its scheduler"):
        tuned("skyreels-forcing")


@pytest.mark.parametrize(
    ("family", "scheduler", "more"),
    [
        ("latte", DDIMScheduler(), {"eta": 1.0}),
        ("latte", EulerAncestralDiscreteScheduler(), {}),
        ("cogvideox", CogVideoXDPMScheduler(), {}),
    ],
    ids=["eta", "ancestral", "cogvideox-dpm"],
)
def test_a_sampler_that_draws_noise_is_refused_where_it_draws_from_the_generator_of_the_call(
    family: str, scheduler: Any, more: dict[str, Any]
) -> None:
    pipe = FAMILIES[family].build()
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    with pytest.raises(UnicpError, match=f"{type(scheduler).__name__}, draws noise"):
        tuned(family, pipe, **more)


def test_plans_are_chosen_on_some_of_the_prompts_and_judged_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each prompt the worse half of the shapes drops out, and the default plan never does."""
    runs: dict[float, list[list[str]]] = {}
    own = trials.Tuner._ranked

    def seen(self: Any, offered: Any, at: str, show: Any) -> list[str]:
        names: list[list[str]] = [[] for _ in self.prompts]

        def real(plan: Any, index: int, _: Any) -> Any:
            names[index].append(next(name for name, one in offered.items() if one is plan))
            return 0.1, 20.0 + 3 * len(plan.segments) - plan.compute[-3], {}

        with monkeypatch.context() as patch:
            patch.setattr(self, "_real", real)
            ranks = own(self, offered, at, show)
        runs[at] = names
        return ranks

    monkeypatch.setattr(trials.Tuner, "_ranked", seen)
    profile = tuned_on("abcd", monkeypatch, effort="medium", target_speedup=1.5)
    for names in runs.values():
        assert names[3] == [] and [len(each) for each in names[:3]] == candidates.remaining(len(names[0]), 3)
        assert all("default" in each and set(each) <= set(before) for before, each in itertools.pairwise(names[:3]))
    assert set(profile.metadata["chosen"]) == {"1.5x", "2x", "3x", "4x"}


@pytest.mark.parametrize("kept", [True, False], ids=["default kept", "another one chosen"])
def test_quality_is_that_of_prompts_on_which_no_plan_was_chosen(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own, judging = trials.Tuner._book, []

    def book(self: Any, *args: Any) -> Any:
        real = self._real

        def seen(plan: Any, index: int, show: Any) -> Any:
            judging.append(index)
            return (*real(plan, index, show)[:1], 30.0 + index, {})

        with monkeypatch.context() as patch:
            patch.setattr(self, "_real", seen)
            return own(self, *args)

    monkeypatch.setattr(trials.Tuner, "_book", book)
    monkeypatch.setattr(trials, "ranked", lambda scores: sorted(scores, key=lambda kind: (kind == "default") != kept))
    profile = tuned_on("abcd", monkeypatch, effort="low", target_speedup=1.5)
    judges = [0, 1, 2, 3] if kept else [3]
    assert sorted(set(judging)) == judges
    about = profile.metadata["budget"]["plans"]
    assert {tuple(entry["psnr"]) for entry in about if len(entry["compute"]) == 5} == {tuple(30.0 + i for i in judges)}
    pipe = WAN.build()
    with unicp.accelerate(pipe, BudgetConfig(profile=profile, min_psnr=20)) as session:
        WAN.generate(pipe)
        assert any(f"judged this plan: {len(judges)}, which promises little" in note for note in session.report().notes)


def test_plans_that_do_the_same_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few steps many shapes are the same plan, which would fill the better half by itself."""
    offers: list[list[Any]] = []
    own = trials.Tuner._ranked

    def ranked(self: Any, offered: Any, *more: Any) -> Any:
        offers.append(list(offered.values()))
        return own(self, offered, *more)

    monkeypatch.setattr(trials.Tuner, "_ranked", ranked)
    tuned(effort="high", steps=8)
    assert offers and all(len(plans) == len({(p.compute, p.segments, p.places) for p in plans}) for plans in offers)
    assert max(map(len, offers)) > 1


def test_what_skipping_cannot_save_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow denoiser saves nearly everything; of the whole runs the median counts, as the first may be cold."""
    overheads: list[float] = []
    own = trials.Tuner._overhead

    def overhead(self: Any) -> float:
        overheads.append(own(self))
        return overheads[-1]

    monkeypatch.setattr(trials.Tuner, "_overhead", overhead)
    pipe = WAN.build()
    pipe.transformer.patch_embedding.register_forward_hook(lambda *_: time.sleep(0.02))
    tuned(pipe=pipe, steps=8)
    assert 0 < overheads[0] < 0.5


@pytest.mark.parametrize(
    ("prompts", "target", "said"),
    [
        ("abc", "min_psnr", True),
        pytest.param("abcd", "min_psnr", False, marks=pytest.mark.slow),
        pytest.param("abc", "target_speedup", False, marks=pytest.mark.slow),
    ],
)
def test_that_few_prompts_judge_where_plans_were_chosen_on_half_of_them_is_said(
    prompts: str, target: str, said: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(trials, "ranked", lambda scores: sorted(scores, key=lambda kind: kind == "default"))
    monkeypatch.setattr(trials, "MIN_PROMPTS_FOR_BOUND", 2)
    tuned_on(prompts, monkeypatch, effort="low", **{target: 1})
    few = "plans were chosen on 2 of the 3 prompts, so that 1 judge them; 4 prompts say with 80% confidence"
    assert any(few in str(each.message) for each in recwarn) == said
    assert said or not any("judge them" in str(each.message) for each in recwarn)


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_what_it_compares_with_is_the_default_plan_of_this_solver(
    scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile that keeps it plays what a budget without a profile does, at its own number of steps and at others."""
    monkeypatch.setattr(trials, "ranked", lambda scores: sorted(scores, key=lambda kind: kind != "default"))
    monkeypatch.setattr(trials.Tuner, "_overhead", lambda _: 0.0)  # of a model this small it is large
    pipe = WAN.build()
    if scheduler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    profile = tuned(pipe=pipe, steps=16)
    for steps in (16, 24):
        timelines = []
        for config in (BudgetConfig(profile=profile, target_speedup=2), BudgetConfig(target_speedup=2)):
            with unicp.accelerate(pipe, config) as session:
                WAN.generate(pipe, steps=steps)
                timelines.append(session.report().timeline())
        assert timelines[0] == timelines[1]


def test_an_unfinished_tuning_with_another_scheduler_does_not_go_on(tmp_path: Path) -> None:
    part = tmp_path / "part.json"

    with pytest.raises(KeyboardInterrupt):
        tuned(checkpoint=part, progress=interrupt)
    pipe = WAN.build()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    with pytest.raises(UnicpError, match="unfinished tuning of another model, prompts or arguments"):
        tuned(pipe=pipe, checkpoint=part)


def test_arguments_are_told_apart_by_what_is_in_them_in_every_process() -> None:
    from PIL import Image

    image = Image.new("RGB", (4, 4), (1, 2, 3))
    there = "from PIL import Image; from unicp.profiles.identity import identity; "
    there += "print(identity([Image.new('RGB', (4, 4), (1, 2, 3))]))"
    made = subprocess.run([sys.executable, "-c", there], capture_output=True, text=True, check=True).stdout
    assert made.strip() == str(identity([image]))
    others = [Image.new("RGB", (4, 4)), np.zeros(3), np.ones(3), torch.ones(3, dtype=torch.bfloat16), 1, "1", None]
    found = [str(identity(value)) for value in [image, *others]]
    assert len(set(found)) == len(found)
    assert identity(len) == identity(len) == "len"


def test_what_tune_cannot_promise_or_take_is_said_before_any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.Tuner, "profile", lambda *_: None)
    pipe = WAN.build()
    with pytest.warns(unicp.UnicpWarning, match="of 7 prompts, min_psnr promises little for others; 8 or more"):
        unicp.tune(pipe, list("abcdefg"), min_psnr=30, progress=False)
    unicp.tune(pipe, list("abcdefgh"), min_psnr=30, progress=False)
    unicp.tune(pipe, ["a"], target_speedup=2, progress=False)
    with pytest.raises(UnicpError, match="draws the noise of every prompt itself, from seed; leave generator out"):
        unicp.tune(pipe, ["a"], generator=torch.Generator(), progress=False)


def test_how_long_a_tuning_takes_is_said_first(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(trials.Tuner, "profile", lambda *_: None)
    unicp.tune(WAN.build(), list("abcdefgh"), progress=True)
    assert "8 prompts, effort medium: about as long as" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, {"ncols": 70}], ids=["never set", "set"])
def test_the_pipeline_has_its_own_progress_bar_again(before: dict[str, Any] | None) -> None:
    for verb in (unicp.tune, unicp.calibrate):
        pipe = WAN.build()
        del pipe._progress_bar_config
        if before is not None:
            pipe.set_progress_bar_config(**before)
        more = {"effort": "low"} if verb is unicp.tune else {}
        WAN.run(pipe, lambda run, verb=verb, more=more, **call: verb(run, None, progress=False, **more, **call))
        assert getattr(pipe, "_progress_bar_config", None) == before
        assert list(pipe.progress_bar(range(2))) == [0, 1]  # diffusers refuses a None in its place


def test_what_was_measured_stays_until_the_profile_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *_: Any) -> Profile:
        raise UnicpError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(trials.Tuner, "_written", fails)
        with pytest.raises(UnicpError, match="is gone"):
            tuned(checkpoint=tmp_path / "part.json")
    assert (tmp_path / "part.json").exists()
    tuned(checkpoint=tmp_path / "part.json")
    assert not (tmp_path / "part.json").exists()


def test_a_tuning_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(checkpoint=tmp_path / "part.json", progress=interrupt)
    pipe = WAN.build()
    with torch.no_grad():
        pipe.transformer.proj_out.weight += 0.1
    with pytest.raises(UnicpError, match="unfinished tuning of another model"):
        tuned(pipe=pipe, checkpoint=tmp_path / "part.json")


def test_a_quality_that_only_the_whole_run_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.Tuner, "_real", lambda *_: (0.1, 45.0, {}))
    with pytest.warns(unicp.UnicpWarning, match=r"min_psnr=60: only computing every step .* reached 45\.0 dB"):
        tuned(min_psnr=60, target_speedup=None)


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_too_few_steps_is_refused(count: int) -> None:
    with pytest.raises(UnicpError, match=f"of {count} steps there is nothing to plan; give num_inference_steps, 4"):
        tuned(steps=count, effort="medium")


def test_a_video_that_begins_in_the_middle_is_not_tuned() -> None:
    family = FAMILIES["wan-video"]
    with pytest.raises(UnicpError, match=r"only 5 of 10 steps were run: .* tune with strength=1"):
        family.run(
            family.build(), lambda run, **call: unicp.tune(run, None, progress=False, **{**call, "strength": 0.5})
        )
