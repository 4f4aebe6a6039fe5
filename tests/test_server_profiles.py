"""A server's folder of profiles: which one is meant, that it is played as ``accelerate`` does, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import UniPCMultistepScheduler

import unicp
from tests.contract import counting
from tests.host_adapters import Diffusers, Host, SGLang, VllmOmni
from tests.tiny import FAMILIES, wan_transformer
from unicp import BudgetConfig, Profile, UnicpError
from unicp.hosts import folder, settings
from unicp.offline import candidates

SERVERS: dict[str, type[Host]] = {"sglang": SGLang, "vllm-omni": VllmOmni}
MODEL = "Tiny-Wan2.1-Diffusers"

servers = pytest.mark.parametrize("name", SERVERS)


class FlowUniPCMultistepScheduler(UniPCMultistepScheduler):
    """Called as both servers call theirs."""


def unipc(kind: Any = UniPCMultistepScheduler) -> Any:
    return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@functools.cache
def tuned(scheduler: str = "euler", **more: Any) -> Profile:
    """Of the model that all hosts of the tests have, at 10 steps."""
    pipe = Diffusers().pipe
    if scheduler == "unipc":
        pipe.scheduler = unipc()
    more = {"effort": "low", "target_speedup": 1.5, "progress": False, **more}
    with patch.object(candidates, "doubt", lambda _: 0.0):  # a single prompt would keep the default plan
        made: Profile = FAMILIES["wan"].run(pipe, lambda run, **call: unicp.tune(run, None, **call, **more))
    return made


def changed(profile: Profile, change: Callable[[dict[str, Any]], None]) -> Profile:
    about = json.loads(json.dumps(dict(profile.metadata)))
    change(about)
    return dataclasses.replace(profile, metadata=about)


def in_all_plans(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Changes fields of every plan."""

    def change(about: dict[str, Any]) -> None:
        for plan in about["budget"]["plans"]:
            plan.update(fields)

    return change


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, with one profile in it."""
    place = tmp_path / "profiles"
    place.mkdir()
    tuned().save(place / "fast.safetensors")
    monkeypatch.setenv(folder.FOLDER, str(place))
    folder._say.cache_clear()
    return place


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Where the served model lies."""
    place = tmp_path / "models" / MODEL
    wan_transformer().save_config(place / "transformer")
    return str(place)


def serving(name: str, asked: Any, model: str, scheduler: Any = None) -> Host:
    """A server that runs a model, and is asked for something."""
    host: Any = SERVERS[name]()
    if name == "sglang":
        host.server.model_path = model
    else:
        host.pipe.od_config.model = model
        asked = {"target_speedup": asked} if isinstance(asked, int | float) else asked
    if scheduler is not None:
        (host.stage if name == "sglang" else host.pipe).scheduler = scheduler
    host.put(asked)
    return host


def decided(report: dict[str, Any]) -> list[tuple[int, str]]:
    """What was done at each step, by the branch that is named first."""
    return list({s["index"]: (s["index"], s["action"]) for s in reversed(report["steps"])}.values())[::-1]


@functools.cache
def accelerated(config: BudgetConfig, steps: int = 10, scheduler: str = "euler") -> dict[str, Any]:
    """The report of the ordinary pipeline."""
    host = Diffusers()
    if scheduler == "unipc":
        host.pipe.scheduler = unipc()
    host.put(config)
    host.make(steps=steps)
    return host.report()


# --- played -----------------------------------------------------------------------------------------------------------


@servers
@pytest.mark.parametrize("steps", [10, 14])
def test_a_named_profile_is_played_as_on_the_ordinary_pipeline(
    name: str, steps: int, profiles: Path, model: str
) -> None:
    wanted = accelerated(BudgetConfig(profile=tuned(), target_speedup=1.3), steps)
    host = serving(name, {"profile": "fast", "target_speedup": 1.3}, model)
    made = host.make(steps=steps)
    report = host.report()
    assert decided(report) == decided(wanted) != decided(accelerated(BudgetConfig(target_speedup=1.3), steps))
    assert 10 > report["computed_steps"] * 10 / steps > 2
    assert any("its plan was carried over" in note for note in report["notes"]) == (steps == 14)
    assert not any("no profile" in note for note in report["notes"])
    assert steps != 10 or torch.equal(host.make(steps=steps), made)


@servers
def test_what_a_request_does_not_say_is_the_profiles(name: str, profiles: Path, model: str) -> None:
    wanted = accelerated(tuned().config.replace(profile=tuned()))
    host = serving(name, {"profile": "fast.safetensors"}, model)
    host.make()
    assert decided(host.report()) == decided(wanted)


@servers
def test_a_quality_is_asked_of_a_profile(name: str, profiles: Path, model: str) -> None:
    def seen(about: dict[str, Any]) -> None:
        for number, plan in enumerate(about["budget"]["plans"]):
            plan.update(psnr=[20.0 + 5 * number] * 8, expected={})

    changed(tuned(), seen).save(profiles / "fast.safetensors")
    wanted = accelerated(BudgetConfig(profile=Profile.load(profiles / "fast.safetensors"), min_psnr=35))
    host = serving(name, {"profile": "fast", "min_psnr": 35}, model)
    host.make()
    assert decided(host.report()) == decided(wanted)
    with pytest.raises(UnicpError, match=r"min_psnr=99: the profile's best plan reached"):
        serving(name, {"profile": "fast", "min_psnr": 99}, model).make()


@servers
@pytest.mark.parametrize("asked", [1.3, {"target_speedup": 1.3}], ids=["number", "mapping"])
def test_a_profile_that_is_called_as_the_model_is_taken(
    name: str, asked: Any, profiles: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "unicp")
    tuned().save(profiles / f"{MODEL}.safetensors")
    host = serving(name, asked, model)
    host.make()
    assert decided(host.report()) == decided(accelerated(BudgetConfig(profile=tuned(), target_speedup=1.3)))
    assert settings.config_of(1.3, model).profile is settings.config_of({"target_speedup": 1.3}, model).profile
    said = [record.getMessage() for record in caplog.records if "called as it" in record.getMessage()]
    assert len(said) == 1 and said[0].endswith(f"{MODEL}.safetensors") and model in said[0]
    assert settings.config_of({"target_speedup": 1.3, "profile": None}, model).profile is None
    assert settings.config_of(1.3, "Wan-AI/another").profile is settings.config_of(1.3).profile is None
    assert settings.config_of({"method": "schedule", "interval": 2}, model) == unicp.ScheduleConfig(interval=2)


def test_the_environment_names_a_profile(profiles: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.CONFIG, '{"profile": "fast", "target_speedup": 1.3}')
    host = serving("sglang", None, model)
    host.take()
    host.make()
    assert decided(host.report()) == decided(accelerated(BudgetConfig(profile=tuned(), target_speedup=1.3)))
    monkeypatch.setenv(settings.CONFIG, '{"profile": "slow"}')
    with pytest.raises(UnicpError, match="UNICP_CONFIG: unknown profile 'slow'; known: fast"):
        host.make()


@servers
def test_a_profile_without_leaps_is_played_under_the_servers_own_solver(name: str, profiles: Path, model: str) -> None:
    profile = tuned("unipc", leap=0.0)
    assert profile.config == BudgetConfig(target_speedup=1.5, leap=0.0)
    seen, leapt = ([p["expected"] for p in found.metadata["budget"]["plans"]] for found in (profile, tuned("unipc")))
    assert seen != leapt  # the plans were run as a server runs them
    profile.save(profiles / "unipc.safetensors")
    wanted = decided(accelerated(BudgetConfig(profile=profile, target_speedup=1.5, leap=0.0), 10, "unipc"))
    host = serving(name, {"profile": "unipc"}, model, unipc(FlowUniPCMultistepScheduler))
    host.make()
    assert decided(host.report()) == wanted
    assert {"compute"} < {action for _, action in wanted} <= {"compute", "forecast", "reuse"}


def test_vllm_omni_takes_longer_steps_where_the_scheduler_is_that_of_diffusers(profiles: Path, model: str) -> None:
    tuned("unipc").save(profiles / "leaps.safetensors")
    wanted = decided(accelerated(BudgetConfig(profile=tuned("unipc"), target_speedup=1.5), 10, "unipc"))
    host = serving("vllm-omni", {"profile": "leaps"}, model, unipc())
    host.make()
    assert decided(host.report()) == wanted and "leap" in {action for _, action in wanted}


def test_errors_of_one_branch_are_no_measure_of_the_guided_prediction(profiles: Path, model: str) -> None:
    """As ``tune`` would have them, each forecast fails: the reserve is spent on the pipeline, and not in SGLang."""
    strict = in_all_plans(psnr=[30.0] * 8, expected={str(step): [1e-9, 0.0] for step in range(10)})
    changed(tuned(), strict).save(profiles / "fast.safetensors")
    spent = "steps of the reserve were spent"
    reports = [accelerated(BudgetConfig(profile=Profile.load(profiles / "fast.safetensors"), min_psnr=30))]
    for name in SERVERS:
        host = serving(name, {"profile": "fast", "min_psnr": 30}, model)
        host.make()
        reports.append(host.report())
    assert [any(spent in note for note in report["notes"]) for report in reports] == [True, False, True]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_once_and_again_when_it_was_written(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = Profile.load
    monkeypatch.setattr(Profile, "load", lambda path: (read.append(os.fspath(path)), load(path))[1])
    first = folder.named("fast")
    assert folder.named("fast.safetensors") is first and len(read) == 1
    path = profiles / "fast.safetensors"
    tuned().save(path)
    os.utime(path, ns=(1, 2))
    assert folder.named("fast") is not first and len(read) == 2


def test_a_request_under_way_does_not_look_at_the_folder_again(profiles: Path, model: str) -> None:
    host: Any = serving("sglang", {"profile": "fast"}, model)
    handle = host.denoiser.register_forward_hook(lambda *_: (profiles / "fast.safetensors").unlink(missing_ok=True))
    host.make()
    handle.remove()
    assert host.report()["complete"]
    with pytest.raises(UnicpError, match="the folder UNICP_PROFILES holds no profile"):
        host.make()


@pytest.mark.parametrize("name", ["../fast", "..", ".", "", "/etc/fast", "a/b", "a\\b", "fast\0"])
def test_a_path_is_no_name(name: str, profiles: Path, tmp_path: Path) -> None:
    tuned().save(tmp_path / "fast.safetensors")
    with pytest.raises(UnicpError, match="profile must be the bare name of one in the folder UNICP_PROFILES, not a"):
        settings.config_of({"profile": name})


def test_the_folder_says_what_it_holds(profiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned().save(profiles / "good.safetensors")
    (profiles / "notes.txt").write_text("")
    with pytest.raises(UnicpError, match=r"unknown profile 'fats'; known: fast, good\. Did you mean 'fast'\?"):
        settings.config_of({"profile": "fats"})
    (profiles / "fast.safetensors").write_bytes(b"no profile")
    with pytest.raises(UnicpError, match=r"fast\.safetensors is not a readable profile"):
        settings.config_of({"profile": "fast"})
    monkeypatch.setenv(folder.FOLDER, str(profiles / "none"))
    for asked in ({"profile": "fast"}, 2):
        with pytest.raises(UnicpError, match=r"UNICP_PROFILES='.*none' is no folder"):
            settings.config_of(asked, MODEL)
    monkeypatch.delenv(folder.FOLDER)
    with pytest.raises(UnicpError, match="this server has no folder of profiles; start it with UNICP_PROFILES=/folder"):
        settings.config_of({"profile": "fast"})
    assert settings.config_of(2, MODEL) == BudgetConfig(target_speedup=2)


# --- refused before the first step ------------------------------------------------------------------------------------


def by_ddim(about: dict[str, Any]) -> None:
    about["scheduler"] = "DDIMScheduler"


def of_another_model(about: dict[str, Any]) -> None:
    about["denoisers"]["transformer"]["fingerprint"] = "0123456789abcdef"


def calibrated_only(about: dict[str, Any]) -> None:
    del about["budget"]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "scheduler": (by_ddim, "made with a DDIMScheduler, this server runs a FlowMatchEuler.*tune with a FlowMatchEuler"),
    "model": (of_another_model, f"does not fit the model that is served, .*{MODEL}: .*fingerprint 0123456789abcdef"),
    "no plans": (calibrated_only, "holds no plans; make one with: unicp tune"),
}


@servers
@pytest.mark.parametrize("case", REFUSED)
def test_a_profile_that_cannot_be_played_is_refused(name: str, case: str, profiles: Path, model: str) -> None:
    change, said = REFUSED[case]
    changed(tuned(), change).save(profiles / "bad.safetensors")
    host: Any = SERVERS[name]()
    with counting([host.denoiser]) as counts, pytest.raises(UnicpError, match=said):
        host = serving(name, {"profile": "bad", "target_speedup": 1.5}, model)
        host.make()
    assert counts == [0]


@servers
def test_plans_of_longer_steps_are_refused_under_the_servers_own_solver(name: str, profiles: Path, model: str) -> None:
    tuned("unipc").save(profiles / "leaps.safetensors")
    host = serving(name, {"profile": "leaps"}, model, unipc(FlowUniPCMultistepScheduler))
    with counting([host.denoiser]) as counts:
        for _ in range(2):
            with pytest.raises(UnicpError, match=r"its solver takes longer steps.*tune with leap=0 \(--leap 0\)"):
                host.make()
    assert counts == [0]


@servers
def test_a_quality_without_a_profile_is_refused(name: str, profiles: Path, model: str) -> None:
    with pytest.raises(UnicpError, match=rf"min_psnr=30 needs a profile: .*UNICP_PROFILES.*{MODEL}\.safetensors"):
        serving(name, {"min_psnr": 30}, model).make()


@servers
def test_a_model_whose_configuration_is_not_here_is_not_checked(
    name: str, profiles: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        host = serving(name, {"profile": "fast", "target_speedup": 1.3}, "/nowhere/Wan")
        host.make()
        assert host.report()["computed_steps"] < 10
    said = [record for record in caplog.records if "was not checked" in record.getMessage()]
    assert len(said) == 1 and said[0].levelname == "WARNING" and "/nowhere/Wan" in said[0].getMessage()


def test_a_denoiser_of_its_own_place_is_looked_for_there(profiles: Path, model: str, tmp_path: Path) -> None:
    wan_transformer(layers=1).save_config(tmp_path / "own")
    host: Any = serving("sglang", {"profile": "fast"}, model)
    host.server.component_paths = {"transformer": str(tmp_path / "own")}
    with pytest.raises(UnicpError, match="made on another WanTransformer3DModel"):
        host.make()
