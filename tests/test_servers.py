"""SGLang-Diffusion and vLLM-Omni: what each of them owes beyond the contract, and their real wheels, where given.

The wheels are fetched by hand, as they need a CUDA stack to be installed: ``pip download --no-deps sglang==0.5.23``,
``pip download --no-deps vllm-omni==0.30.0``; ``UNICP_SGLANG_WHEEL`` and ``UNICP_VLLM_OMNI_WHEEL`` name the files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomllib
import torch

from tests.contract import counting
from tests.host_adapters import SGLang, Stage, VllmOmni, hooked
from tests.test_host_contract import BreakingOff, breaking_off
from tests.test_house import ROOT
from tests.tiny import wan_transformer
from unicp import BudgetConfig, ScheduleConfig, UnicpError
from unicp.hosts import settings, sglang, vllm_omni

BUDGET = BudgetConfig(target_speedup=2)


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.from_environment() is None
    monkeypatch.setenv("UNICP_TARGET_SPEEDUP", "3")
    assert settings.from_environment() == BudgetConfig(target_speedup=3.0)
    monkeypatch.setenv("UNICP_CONFIG", '{"method": "schedule", "interval": 3}')
    with pytest.raises(UnicpError, match="set UNICP_TARGET_SPEEDUP or UNICP_CONFIG, not both"):
        settings.from_environment()
    monkeypatch.delenv("UNICP_TARGET_SPEEDUP")
    assert settings.from_environment() == ScheduleConfig(interval=3)
    monkeypatch.setenv("UNICP_CONFIG", "3x")
    with pytest.raises(UnicpError, match="UNICP_CONFIG='3x' cannot be read: it takes JSON"):
        settings.from_environment()
    monkeypatch.setenv("UNICP_CONFIG", '{"target_speedup": 0.5}')
    with pytest.raises(UnicpError, match=r"UNICP_CONFIG: target_speedup must be a number of at least 1"):
        settings.from_environment()


def test_a_request_counts_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNICP_TARGET_SPEEDUP", "2")
    host = SGLang()
    plain = hooked(Stage(host.denoiser))
    host.make()
    assert host.report()["computed_steps"] == 5
    host.put(3)
    host.make()
    assert host.report()["computed_steps"] == 3
    host.put(False)
    made = host.make()
    assert sglang.REPORT not in host.batch.extra
    monkeypatch.delenv("UNICP_TARGET_SPEEDUP")
    assert torch.equal(made, plain.forward(host.request(), host.server))


# --- SGLang ---------------------------------------------------------------------------------------------------------


def test_requests_that_warm_a_server_up_are_computed() -> None:
    host = SGLang()
    host.put(2)
    batch = host.request(warm=True)
    with counting([host.denoiser]) as counts:
        host.stage.forward(batch, host.server)
    assert counts == [20] and sglang.REPORT not in batch.extra


def test_experts_do_not_fill_each_other() -> None:
    host = SGLang()
    second = wan_transformer(seed=1)
    host.stage = hooked(Stage(host.denoiser, second))
    host.put(2)
    with counting([host.denoiser, second]) as counts:
        host.make()
    steps = host.report()["steps"]
    assert [step["branch"] for step in steps] == ["expert 1"] * 5 + ["expert 2"] * 5
    assert steps[5]["action"] == "compute"
    assert counts == [2 * sum(s["action"] == "compute" for s in part) for part in (steps[:5], steps[5:])]
    assert sum(counts) <= 12


def test_a_second_pass_and_another_size_in_one_request_begin_anew() -> None:
    host = SGLang()
    host.put(2)
    batch = host.request()
    first = host.stage.forward(batch, host.server)
    assert torch.equal(host.stage.forward(batch, host.server), first)
    calls: list[Any] = []

    def grows(stage: Any, current_model: Any, batch: Any, timestep_index: int, latents: Any, server_args: Any) -> Any:
        calls.append(timestep_index)
        return latents

    batch = host.request()
    batch.timesteps = torch.linspace(1000, 100, 10)
    for index in range(10):
        size = 4 if index < 6 else 8
        output = sglang.predict(
            grows,
            host.stage,
            current_model=host.denoiser,
            batch=batch,
            timestep_index=index,
            latents=torch.zeros(1, 4, 1, size, size),
            server_args=host.server,
        )
        assert output.shape[-1] == size
    assert 6 in calls and len(calls) < 10


def test_samplers_that_draw_noise_are_refused() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    host = SGLang()
    host.stage.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    host.put(2)
    with pytest.raises(UnicpError, match="FlowMatchEulerDiscreteScheduler draws noise at its steps"):
        host.make()


# --- vLLM-Omni ------------------------------------------------------------------------------------------------------


def test_the_backend_is_chosen_by_its_name_alone() -> None:
    asked: list[Any] = []
    choose = vllm_omni.answering(lambda name, config: asked.append((name, config)))
    choose("tea_cache", {"rel_l1_thresh": 0.2})
    assert asked == [("tea_cache", {"rel_l1_thresh": 0.2})]
    theirs = SimpleNamespace(rel_l1_thresh=None, _extra_params={"target_speedup": 4})
    assert choose("unicp", theirs)._acting == BudgetConfig(target_speedup=4)
    assert choose("unicp", {})._acting == BUDGET
    assert len(asked) == 1


def test_the_report_of_a_request_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    host = VllmOmni()
    host.put(BUDGET)
    caplog.set_level("INFO", "unicp")
    host.make()
    host.make()
    host.backend.refresh(host.pipe, 10)
    host.backend.refresh(host.pipe, 10)
    assert [record.getMessage()[:46] for record in caplog.records] == [
        "budget: 5 of 10 denoising steps computed (50% "
    ] * 2


def test_a_request_that_broke_off_is_let_go_of_at_the_next(caplog: pytest.LogCaptureFixture) -> None:
    host = VllmOmni()
    host.put(BUDGET)
    caplog.set_level("INFO", "unicp")
    with breaking_off(host.denoiser, 5), pytest.raises(BreakingOff):
        host.make()
    assert host.backend.session.cached_tensors()
    host.backend.refresh(host.pipe, 10)
    assert not host.backend.session.cached_tensors()
    assert len(caplog.records) == 1


# --- the wheels -----------------------------------------------------------------------------------------------------

WHEELS = {"sglang": "UNICP_SGLANG_WHEEL", "vllm-omni": "UNICP_VLLM_OMNI_WHEEL"}
PARTS = ("sglang/multimodal_gen/", "sglang/srt/", "vllm_omni/")


@pytest.mark.slow
@pytest.mark.parametrize("server", WHEELS)
def test_the_real_server_finds_the_plug_in(server: str, tmp_path: Path) -> None:
    wheel = os.environ.get(WHEELS[server])
    if wheel is None:
        pytest.skip(f"set {WHEELS[server]} to its wheel, from: pip download --no-deps {server}")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [n for n in archive.namelist() if n.startswith(PARTS) and n.endswith(".py")])
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    about = tmp_path / "ours" / "unicp-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: unicp\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in names.items()) for group, names in groups.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))
    path = os.pathsep.join(map(str, (about.parent, ROOT / "src", ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.wheel_of_a_server", server, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "as found in the wheel" in done.stdout, done.stderr[-3000:]


def test_the_plug_ins_are_found_without_importing_anything_heavy() -> None:
    lines = (
        "import sys, unicp.hosts.sglang, unicp.hosts.vllm_omni; print({'torch', 'numpy', 'diffusers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
