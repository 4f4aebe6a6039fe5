"""The ComfyUI nodes, on a stand-in of the program's wrapper protocol and a tiny Wan transformer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

import unicp
from benchmarks import comfyui as bench
from benchmarks import figures
from tests import comfy_stand_in as comfy
from tests.tiny import wan_transformer
from unicp import BudgetConfig, Profile, UnicpError
from unicp.hosts.comfyui import NODE_CLASS_MAPPINGS
from unicp.hosts.comfyui.nodes import NOTHING, PLAIN, Speedup, UnicpReport, UnicpSpeedup
from unicp.hosts.comfyui.samplers import FORECASTS, LONGER_STEPS, WAYS, response, way_of
from unicp.hosts.comfyui.sampling import ELSEWHERE, KEY, SWITCHED, UNCHECKED, Sampling

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "integrations" / "comfyui"
STEPS = 20
NOISY = ("euler_ancestral", "dpmpp_2m_sde")
PLAINLY = ("euler", "ddim", "heun", "dpm_2", "dpmpp_2m", "uni_pc", "uni_pc_bh2", "lms")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("comfy", "comfy.patcher_extension"):
        monkeypatch.setitem(sys.modules, name, None)  # remembered, to be put back
    comfy.install()


class Studio:
    """A model, a prompt and noise, as a workflow has them."""

    def __init__(self, sampling: Any = None, together: bool = True) -> None:
        self.network = wan_transformer()
        self.sampling = sampling or comfy.Flow(shift=3.0)
        self.model = comfy.Model(self._velocity, self.sampling, together)
        self.patcher = comfy.ModelPatcher(self.model)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1, 4, 4, 8, 8, generator=generator)
        self.positive, self.negative = torch.randn(2, 1, 6, 16, generator=generator)
        self.asked: list[float] = []

    def _velocity(self, x: Any, sigma: Any, context: Any) -> Any:
        self.asked.append(float(sigma[0]))
        return self.network(x, 1000 * sigma, context, return_dict=False)[0]

    def sped(self, speed: float = 2.0, profile: str = "") -> comfy.ModelPatcher:
        return UnicpSpeedup().apply(self.patcher, speed, profile)[0]

    def sample(
        self,
        model: comfy.ModelPatcher | None = None,
        sampler: str | comfy.KSAMPLER = "euler",
        steps: int = STEPS,
        cfg: float = 4.0,
        sigmas: Any = None,
        latent: Any = None,
        noise: Any = None,
        positive: Any = None,
        **more: Any,
    ) -> Any:
        """The latents at the end of a sampling run."""
        noise = self.noise if noise is None else noise
        grid = comfy.levels(self.sampling, sampler, steps) if isinstance(sampler, str) and sigmas is None else sigmas
        guider = comfy.CFGGuider(
            model or self.patcher, self.positive if positive is None else positive, self.negative, cfg
        )
        ready = comfy.sampler_object(sampler) if isinstance(sampler, str) else sampler
        self.asked.clear()
        self.model.forwards = 0
        torch.manual_seed(5)
        return guider.sample(noise, torch.zeros_like(noise) if latent is None else latent, ready, grid, **more)


@pytest.fixture
def studio() -> Studio:
    return Studio()


def speedup_of(model: comfy.ModelPatcher) -> Speedup:
    (wrapper,) = model.get_wrappers("outer_sample", KEY)
    return wrapper.__self__


def report(model: comfy.ModelPatcher) -> Any:
    return speedup_of(model).fresh()[-1]


# --- how much, and what is said -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", PLAINLY)
def test_half_of_the_evaluations_at_twice_the_speed(studio: Studio, sampler: str) -> None:
    plain = studio.sample(sampler=sampler)
    all_of_them = studio.model.forwards
    model = studio.sped(2.0)
    made = studio.sample(model, sampler)
    assert studio.model.forwards <= 0.55 * all_of_them
    assert torch.isfinite(made).all() and not torch.equal(made, plain)
    assert report(model).computed * 2 == studio.model.forwards  # cond and uncond
    assert report(model).speedup == pytest.approx(all_of_them / studio.model.forwards, rel=0.06)


def test_what_was_computed_is_shown_behind_the_sampler(studio: Studio) -> None:
    model = studio.sped(2.0)
    latent = {"samples": None}
    assert UnicpReport().show(latent, model)["ui"]["text"] == [NOTHING]
    studio.sample(model)
    shown = UnicpReport().show(latent, model.clone())
    assert shown["result"][0] is latent
    assert "unicp, euler: 10 of 20 evaluations computed, 2.00x" in shown["result"][1]
    assert "##~#" in shown["result"][1]
    assert "10 longer steps in place of 20" in str(_ran(studio, model, "lms"))
    assert UnicpReport().show(latent, studio.patcher)["ui"]["text"] == [PLAIN]


def _ran(studio: Studio, model: comfy.ModelPatcher, sampler: str) -> Any:
    studio.sample(model, sampler)
    return report(model)


def test_runs_that_ended_since_are_shown_together(studio: Studio) -> None:
    model = studio.sped(2.0)
    studio.sample(model, "euler")
    studio.sample(model, "dpmpp_2m")
    text = UnicpReport().show({}, model)["result"][1]
    assert "unicp, euler" in text and "unicp, dpmpp_2m" in text
    assert "unicp, euler" not in UnicpReport().show({}, model)["result"][1]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_target_that_the_steps_cannot_give_is_said(studio: Studio, sampler: str) -> None:
    model = studio.sped(3.0)
    studio.sample(model, sampler, steps=4)
    said = " ".join(report(model).notes)
    assert "target_speedup=3 cannot be had of 4 steps" in said
    studio.sample(model, sampler, steps=12)
    assert "cannot be had" not in " ".join(report(model).notes)


# --- nothing where nothing is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*PLAINLY, *NOISY, "euler_cfg_pp"])
def test_target_1_changes_nothing(studio: Studio, sampler: str) -> None:
    assert torch.equal(studio.sample(studio.sped(1.0), sampler), studio.sample(sampler=sampler))


def test_the_model_without_the_node_is_as_before(studio: Studio) -> None:
    before = studio.sample()
    studio.sample(studio.sped(3.0))
    assert torch.equal(studio.sample(), before)
    assert not studio.patcher.wrappers


def test_every_step_computed_is_bitwise_the_plain_run(studio: Studio) -> None:
    # A profile's plan may compute all steps: the wrappers act, and no bit changes.
    model = studio.sped(1.01)
    made = studio.sample(model, "euler", steps=2)
    assert report(model).computed == 2
    assert torch.equal(made, studio.sample(sampler="euler", steps=2))


@pytest.mark.parametrize("sampler", PLAINLY)
def test_two_runs_agree_bitwise(studio: Studio, sampler: str) -> None:
    model = studio.sped(2.0)
    assert torch.equal(studio.sample(model, sampler), studio.sample(model, sampler))


# --- state of a run -------------------------------------------------------------------------------------------------


def test_state_lies_in_the_runs_own_options(studio: Studio) -> None:
    model = studio.sped(2.0)
    options: list[dict] = []

    def look(executor: Any, x: Any, timestep: Any, model_options: dict, seed: Any) -> Any:
        options.append(executor.class_obj.model_options["transformer_options"])
        return executor(x, timestep, model_options, seed)

    watched = model.clone()
    watched.add_wrapper_with_key("predict_noise", "look", look)
    studio.sample(watched)
    studio.sample(watched)
    states = [o[KEY] for o in options]
    assert len(set(map(id, states))) == 2 and all(isinstance(state, Sampling) for state in states)
    assert KEY not in watched.model_options["transformer_options"]
    assert KEY not in model.model_options["transformer_options"]


def test_applied_twice_it_acts_once_and_the_last_one_counts(studio: Studio) -> None:
    once = studio.sample(studio.sped(3.0))
    twice = UnicpSpeedup().apply(studio.sped(1.5), 3.0)[0]
    assert torch.equal(studio.sample(twice), once)
    assert report(twice).evaluations == STEPS
    assert not UnicpSpeedup().apply(twice, 1.0)[0].get_wrappers("outer_sample", KEY)


def test_later_nodes_clone_it(studio: Studio) -> None:
    model = studio.sped(2.0)
    later, other = model.clone(), model.clone()
    later.add_wrapper_with_key("calc_cond_batch", "other node", lambda executor, *a: executor(*a))
    assert torch.equal(studio.sample(later), studio.sample(other))


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_an_interrupt_leaves_the_next_run_clean(studio: Studio, sampler: str) -> None:
    model = studio.sped(2.0)
    wanted = studio.sample(model, sampler)

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.sample(model, sampler, callback=stop)
    assert torch.equal(studio.sample(model, sampler), wanted)


def test_another_size_another_number_of_steps_another_prompt(studio: Studio) -> None:
    model = studio.sped(2.0)
    wide = torch.randn(2, 4, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    calls: list[dict] = [{"noise": wide}, {"steps": 14}, {"positive": -studio.positive}]
    alone = [studio.sample(studio.sped(2.0), **call) for call in calls]
    for call, wanted in zip(calls, alone, strict=True):
        studio.sample(model)
        assert torch.equal(studio.sample(model, **call), wanted)


def test_it_runs_under_inference_mode(studio: Studio) -> None:
    with torch.inference_mode():
        made = studio.sample(studio.sped(2.0))
    assert made.is_inference()


# --- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*NOISY, "euler_cfg_pp"])
def test_samplers_that_cannot_skip_are_refused_before_the_first_step(studio: Studio, sampler: str) -> None:
    why = "reads the unconditional" if "cfg_pp" in sampler else "draws noise"
    with pytest.raises(UnicpError, match=rf"the sampler {sampler} {why}.*take one of euler.*or bypass the unicp node"):
        studio.sample(studio.sped(2.0), sampler)
    assert not studio.asked


def test_options_that_make_a_sampler_draw_noise_are_refused(studio: Studio) -> None:
    model = studio.sped(2.0)
    with pytest.raises(UnicpError, match=r"euler draws noise at its steps with s_churn=0\.3; set s_churn to 0"):
        studio.sample(model, comfy.sampler_object("euler", s_churn=0.3), sigmas=comfy.simple(studio.sampling, STEPS))
    studio.sample(model, comfy.sampler_object("euler", s_churn=0.0), sigmas=comfy.simple(studio.sampling, STEPS))
    with pytest.raises(UnicpError, match="eta=1"):
        way_of(comfy.KSAMPLER(comfy.sample_heun, {"eta": 1.0}))


def test_an_unknown_sampler_is_refused_by_name() -> None:
    def sample_secret() -> None:
        pass

    with pytest.raises(UnicpError, match="does not know the sampler secret"):
        way_of(comfy.KSAMPLER(sample_secret))
    with pytest.raises(UnicpError, match="does not know the sampler object"):
        way_of(object())


def test_what_the_stand_in_calls_noisy_is_noisy(studio: Studio) -> None:
    for sampler in (*PLAINLY, *NOISY):
        grid = comfy.levels(studio.sampling, sampler, 6)
        ends = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            ready = comfy.sampler_object(sampler)
            ends.append(ready.sampler_function(lambda x, s, **_: 0.5 * x, studio.noise, grid.clone()))
        assert torch.equal(*ends) == (sampler not in NOISY)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_samplers_of_two_stages_ask_at_no_other_levels_than_fewer_steps_would(studio: Studio, sampler: str) -> None:
    model = studio.sped(2.0)
    made = studio.sample(model, sampler)
    asked = list(studio.asked)
    grid = comfy.levels(studio.sampling, sampler, STEPS)
    fewer = torch.tensor([float(s) for s in grid[:-1:2]] + [0.0])
    assert torch.equal(made, studio.sample(sampler=sampler, sigmas=fewer))
    assert asked == pytest.approx(studio.asked)


def sampling(sigmas: Any = None, speed: float = 2.0) -> Sampling:
    grid = comfy.simple(comfy.Flow(3.0), STEPS).tolist() if sigmas is None else sigmas
    return Sampling(BudgetConfig(target_speedup=speed), comfy.sampler_object("euler"), grid)


def test_evaluations_off_the_grid_are_computed() -> None:
    run = sampling()
    x = torch.ones(1, 4)
    computed = 0

    def compute() -> Any:
        nonlocal computed
        computed += 1
        return 0.5 * x

    for a, b in zip(run.sigmas[:6], run.sigmas[1:7], strict=True):
        for sigma in (a, (a * b) ** 0.5):
            assert torch.equal(run.predict(compute, x, torch.tensor([sigma])), 0.5 * x)
    assert computed == 12 and ELSEWHERE in run.report().notes


def test_repeated_evaluations_at_a_level_are_computed() -> None:
    run = sampling()
    x = torch.ones(1, 4)
    for sigma in run.sigmas[:6]:
        for _ in range(2):
            assert torch.equal(run.predict(lambda: 0.5 * x, x, torch.tensor([sigma])), 0.5 * x)
    assert run.report().computed == 12 and ELSEWHERE in run.report().notes


def test_evaluations_beyond_the_last_step_are_computed() -> None:
    run = sampling([1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])
    x = torch.ones(1, 4)
    for sigma in (1.0, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05):
        run.predict(lambda: 0.5 * x, x, torch.tensor([sigma]))
    assert run.report().evaluations == 8 and ELSEWHERE in run.report().notes


@pytest.mark.parametrize("sampler", ["uni_pc", "uni_pc_bh2"])
def test_the_last_level_that_unipc_overwrites(studio: Studio, sampler: str) -> None:
    grid = comfy.levels(studio.sampling, sampler, STEPS)
    model = studio.sped(2.0)
    made = studio.sample(model, sampler, sigmas=grid)
    assert grid[-1] == 0  # the sampler was given levels of its own
    plain = grid.clone()
    studio.sample(sampler=sampler, sigmas=plain)
    assert plain[-1] == pytest.approx(0.001)
    assert torch.isfinite(made).all()


def test_levels_that_rise_are_refused(studio: Studio) -> None:
    with pytest.raises(UnicpError, match=r"rise.*bypass the unicp node"):
        studio.sample(studio.sped(2.0), sigmas=comfy.simple(studio.sampling, 6).flip(0).clamp_min(1e-3))


def test_two_samplers_in_a_row_each_play_their_own_part(studio: Studio) -> None:
    grid = comfy.simple(studio.sampling, 2 * STEPS)
    model = studio.sped(2.0)
    leftover = studio.sample(model, sigmas=grid[: STEPS + 1])
    first = report(model)
    assert first.evaluations == STEPS and first.computed == STEPS / 2
    made = studio.sample(model, sigmas=grid[STEPS:], latent=leftover, noise=torch.zeros_like(studio.noise))
    second = report(model)
    assert second.computed == STEPS / 2 and second.session.steps[0].action == "compute"
    assert [round(r.sigma, 5) for r in second.session.steps] == [round(s, 5) for s in grid[STEPS:-1].tolist()]
    assert second.session.timeline() != first.session.timeline()  # the steps of the second half are of other lengths
    assert torch.isfinite(made).all()


def test_two_longer_stepped_samplers_meet_at_the_same_level(studio: Studio) -> None:
    grid = comfy.simple(studio.sampling, STEPS)
    for part in (grid[:9], grid[8:]):
        run = Sampling(BudgetConfig(target_speedup=2), comfy.sampler_object("dpmpp_2m"), part.tolist())
        assert (run.sigmas[0], run.sigmas[-1]) == (part[0], part[-1])
        assert len(run.sigmas) - 1 == (len(part) - 1) // 2


def test_the_huge_last_steps_of_a_large_shift_are_computed() -> None:
    studio = Studio(comfy.Flow(shift=8.0))
    for speed in (1.5, 2.0):
        model = studio.sped(speed)
        studio.sample(model)
        assert report(model).session.steps[-1].action == "compute"


# --- branches -------------------------------------------------------------------------------------------------------


def test_branches_apart_or_together_make_one_video() -> None:
    made = [studio.sample(studio.sped(2.0)) for studio in (Studio(together=True), Studio(together=False))]
    assert torch.allclose(*made, atol=1e-4)


def test_prompts_of_other_lengths_and_more_than_one(studio: Studio) -> None:
    longer = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2))
    model = studio.sped(2.0)
    studio.sample(model, positive=[studio.positive, longer])
    assert studio.model.forwards == 3 * 10


def test_without_guidance_one_branch_is_computed(studio: Studio) -> None:
    model = studio.sped(2.0)
    studio.sample(model, cfg=1.0)
    assert studio.model.forwards == 10


def test_context_windows_act_below(studio: Studio) -> None:
    studio.patcher.model_options["context_windows"] = 2
    plain = studio.sample()
    assert studio.model.forwards == 2 * 2 * STEPS
    made = studio.sample(studio.sped(2.0))
    assert studio.model.forwards == 2 * 2 * STEPS / 2
    assert (made - plain).abs().mean() < 0.2 * plain.abs().mean()


def test_a_batch_is_as_its_videos_alone(studio: Studio) -> None:
    noise = torch.randn(2, *studio.noise.shape[1:], generator=torch.Generator().manual_seed(3))
    model = studio.sped(2.0)
    together = studio.sample(model, noise=noise)
    for i in range(2):
        assert torch.allclose(studio.sample(model, noise=noise[i : i + 1]), together[i : i + 1], atol=1e-4)


def test_a_condition_that_switches_off_begins_forecasts_anew(studio: Studio) -> None:
    grid = comfy.simple(studio.sampling, STEPS).tolist()
    half = [
        {"cross_attn": studio.positive, "timestep_end": grid[7]},
        {"cross_attn": -studio.positive, "timestep_start": grid[8]},
    ]
    model = studio.sped(2.0)
    studio.sample(model, positive=half)
    switched = report(model)
    assert SWITCHED in switched.notes
    assert switched.session.steps[8].action == "compute"
    studio.sample(model)
    assert SWITCHED not in report(model).notes


def test_a_mask_keeps_what_it_covers(studio: Studio) -> None:
    mask = torch.zeros(1, 1, 4, 8, 8)
    mask[..., :4] = 1
    latent = torch.ones_like(studio.noise)
    made = studio.sample(studio.sped(2.0), latent=latent, denoise_mask=mask)
    assert torch.allclose(made[..., 4:], latent[..., 4:], atol=1e-5)
    assert not torch.allclose(made[..., :4], latent[..., :4], atol=1e-2)


def test_models_that_predict_noise_are_forecast_by_the_same_formula() -> None:
    studio = Studio(comfy.Eps())
    plain = studio.sample()
    made = studio.sample(studio.sped(2.0))
    fewer = studio.sample(steps=10)
    assert (made - plain).norm() < (fewer - plain).norm()


# --- reads of the device --------------------------------------------------------------------------------------------


def test_the_device_is_read_where_the_model_runs_and_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio()
    reads: list[int] = []
    at = Sampling._at

    def counted(timestep: Any, sigma: float) -> bool:
        reads.append(1)
        return at(timestep, sigma)

    monkeypatch.setattr(Sampling, "_at", staticmethod(counted))
    model = studio.sped(2.0)
    studio.sample(model)
    assert len(reads) <= report(model).computed + 1


# --- what a sampler makes of outputs --------------------------------------------------------------------------------


def test_the_response_of_samplers(studio: Studio) -> None:
    for sampler in ("euler", "dpmpp_2m", "uni_pc", "lms"):
        grid = comfy.levels(studio.sampling, sampler, 8)
        found = response(comfy.sampler_object(sampler), grid.tolist())
        assert found is not None and len(found) == 8
        if sampler == "euler":
            assert found == pytest.approx((grid[1:] - grid[:-1]).tolist())
        # A constant velocity is integrated exactly; UniPC ends at 0.001.
        assert sum(found) == pytest.approx(-float(grid[0]), abs=2e-3)
    for sampler in ("heun", "dpm_2"):
        assert response(comfy.sampler_object(sampler), grid.tolist()) is None


# --- profiles and inputs --------------------------------------------------------------------------------------------


def _profile(path: Path, scheduler: str) -> str:
    from unicp.policies.budget import PlanBook, Priced
    from unicp.policies.plans.step_plan import growing

    grid = comfy.simple(comfy.Flow(3.0), STEPS).tolist()
    plan = growing(STEPS, 8, 4)
    book = PlanBook(sigmas=tuple(grid[:-1]), plans=(Priced(plan=plan, speedup=2.5, psnr=(), expected={}),))
    about = {"budget": book.to_dict(), "scheduler": scheduler, "denoisers": {}}
    Profile(config=BudgetConfig(target_speedup=2), metadata=about).save(path)
    return str(path)


def test_a_profiles_plan_is_played_by_noise_level(studio: Studio, tmp_path: Path) -> None:
    model = studio.sped(2.0, _profile(tmp_path / "p.safetensors", "FlowMatchEulerDiscreteScheduler"))
    studio.sample(model)
    assert report(model).computed == 8
    assert report(model).session.timeline()["guided"].startswith("####~")
    assert UNCHECKED in report(model).notes
    studio.sample(model, steps=30)
    assert report(model).computed == 12 and any("carried over" in note for note in report(model).notes)
    with pytest.raises(UnicpError, match="the plans of a profile are for the sampler euler, and dpmpp_2m is not"):
        studio.sample(model, "dpmpp_2m")


def test_profiles_that_hold_no_such_plan_are_refused(studio: Studio, tmp_path: Path) -> None:
    made = _profile(tmp_path / "p.safetensors", "UniPCMultistepScheduler")
    with pytest.raises(UnicpError, match=r"made with a UniPCMultistepScheduler.*tune with FlowMatchEulerDiscrete"):
        studio.sped(2.0, made)
    with pytest.raises(UnicpError, match="there is no profile"):
        studio.sped(2.0, str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("speed", [0.5, 6.5, float("nan")])
def test_speeds_out_of_range(studio: Studio, speed: float) -> None:
    with pytest.raises(UnicpError, match="target_speedup must be 1 to 6"):
        studio.sped(speed)


# --- the package ----------------------------------------------------------------------------------------------------

ALONE = """
import importlib.util, sys
from tests import comfy_stand_in
comfy_stand_in.install()
spec = importlib.util.spec_from_file_location("nodes_of_unicp", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(module.NODE_CLASS_MAPPINGS), sorted(module.NODE_DISPLAY_NAME_MAPPINGS))
for node in module.NODE_CLASS_MAPPINGS.values():
    assert callable(getattr(node, node.FUNCTION)) and node.INPUT_TYPES()["required"]
print([name for name in ("diffusers", "transformers", "matplotlib") if name in sys.modules])
"""
LEAN = """
import sys, unicp, unicp.hosts
print([name for name in sys.modules if "comfy" in name])
import unicp.hosts.comfyui
print("comfy" in sys.modules)
"""


def _python(code: str, *args: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_the_package_loads_beside_the_stand_in_alone() -> None:
    both = str(["UnicpReport", "UnicpSpeedup"])
    assert _python(ALONE, str(FOLDER / "__init__.py"))[:2] == [f"{both} {both}", "[]"]


def test_neither_unicp_nor_the_host_imports_comfy() -> None:
    assert _python(LEAN)[:2] == ["[]", "False"]


def test_the_example_workflow_names_what_the_nodes_have() -> None:
    workflow = json.loads((FOLDER / "example_workflows" / "unicp.json").read_text("utf-8"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in nodes.values() if node["type"] in NODE_CLASS_MAPPINGS]
    assert sorted(node["type"] for node in ours) == sorted(NODE_CLASS_MAPPINGS)
    for node in ours:
        kind = NODE_CLASS_MAPPINGS[node["type"]]
        inputs = {**kind.INPUT_TYPES()["required"], **kind.INPUT_TYPES().get("optional", {})}
        linked = [name for name, (what, *_) in inputs.items() if what not in ("FLOAT", "STRING")]
        assert [slot["name"] for slot in node["inputs"]] == linked
        assert [slot["type"] for slot in node["outputs"]] == list(kind.RETURN_TYPES)
        assert len(node["widgets_values"]) == len(inputs) - len(linked)
    for number, source, slot, target, place, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == number
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][place]["type"] == kind


def test_the_metadata_of_the_package() -> None:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        pytest.skip("tomllib is in the standard library from Python 3.11 on")
    about = tomllib.loads((FOLDER / "pyproject.toml").read_text("utf-8"))
    assert about["project"]["version"] == unicp.__version__
    assert about["tool"]["comfy"]["DisplayName"] == "unicp"
    assert (FOLDER / about["project"]["license"]["file"]).read_text("utf-8") == (ROOT / "LICENSE").read_text("utf-8")


def test_the_figures_of_the_docs_are_the_committed_ones() -> None:
    values = figures.read(bench.common.RESULTS / "comfyui.json")
    text = bench.PAGE.read_text("utf-8")
    assert bench.page(text, values) == text, "run: python -m benchmarks.comfyui --collect"


def test_twice_the_speed_is_5_db_nearer_than_half_the_steps() -> None:
    """In the committed figures, in the mean over captions."""
    found = figures.read(bench.common.RESULTS / "comfyui.json")["results"]
    psnr = {(row["sampler"], row["method"]): mean(row["psnr"]) for row in found}
    for sampler in bench.SAMPLERS:
        assert psnr[sampler, "unicp 2x"] >= psnr[sampler, "half the steps"] + 5
    assert all(row["share"] <= 0.55 for row in found if row["method"] == "unicp 2x")


def test_every_sampler_has_a_way() -> None:
    assert set(WAYS.values()) == {FORECASTS, LONGER_STEPS}
