"""What people do to a pipeline between, around and instead of two runs. docs/robustness.md lists it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import unicp
import unicp.hosts.diffusers.session as session_module
from tests.contract import case, fresh, plain, quietly, traces
from tests.tiny import FAMILIES
from unicp.errors import UnicpError, UnicpWarning
from unicp.policies import Config
from unicp.specs import BlockList
from unicp.tensors import extrapolation

WAN = FAMILIES["wan"]
METHODS = {
    "adacache": case("adacache-residual").config,
    "forecast": case("adacache-forecast").config,
    "unicp": case("unicp-online").config,
    "budget": case("budget-default").config,
}
methods = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)


def result_of(config: Config, **request: Any) -> torch.Tensor:
    pipe = WAN.build()
    unicp.accelerate(pipe, config)
    latents: torch.Tensor = quietly(lambda: WAN.generate(pipe, **request))
    return latents


@methods
def test_an_accelerated_pipeline_is_not_copied_silently(config: Config) -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    with pytest.raises(UnicpError, match=r"cannot be copied: unicp.restore"):
        copy.deepcopy(pipe.transformer)
    with pytest.raises((UnicpError, pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(pipe.transformer)
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), result_of(config))
    session.restore()
    twin = copy.deepcopy(pipe.transformer)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), pipe.transformer.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(pipe.transformer.state_dict(), buffer)


@methods
def test_the_state_dict_is_that_of_the_original(config: Config) -> None:
    pipe = WAN.build()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    unicp.accelerate(pipe, config)
    quietly(lambda: WAN.generate(pipe))
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@methods
def test_two_threads_with_two_pipelines(config: Config) -> None:
    expected = [result_of(config, seed=seed) for seed in (0, 1)]
    made: dict[int, torch.Tensor] = {}

    pipes = [WAN.build(), WAN.build()]  # not in the threads: weights are drawn from torch's one generator

    def work(seed: int) -> None:
        unicp.accelerate(pipes[seed], config)
        made[seed] = WAN.generate(pipes[seed], seed=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, wanted in enumerate(expected):
        torch.testing.assert_close(made[seed], wanted)  # torch's thread count may differ, and with it the rounding


@methods
def test_a_pipeline_may_be_interrupted_by_its_own_flag(config: Config) -> None:
    """``pipe._interrupt``: diffusers goes through the remaining steps without calling the denoiser."""
    pipe = WAN.build()
    unicp.accelerate(pipe, config)

    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == 4:
            pipe._interrupt = True
        return tensors

    quietly(lambda: WAN.generate(pipe, callback=stop))
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), result_of(config))


@methods
def test_everything_is_freed_with_the_pipeline(config: Config) -> None:
    def used() -> weakref.ref[torch.nn.Module]:
        pipe = WAN.build()
        session = unicp.accelerate(pipe, config)
        quietly(lambda: WAN.generate(pipe))
        session.restore()
        return weakref.ref(pipe.transformer)

    gone = used()
    gc.collect()
    assert gone() is None


@methods
def test_the_same_transformer_in_two_pipelines(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Outputs of a random model turn off at every step, which by itself corrects nothing.
    monkeypatch.setattr(extrapolation, "steadiness", lambda new, *_: torch.ones(len(new), *(1,) * (new.ndim - 1)))
    pipe = WAN.build()
    twin = WAN.build()
    twin.transformer = pipe.transformer
    session = unicp.accelerate(pipe, config)
    first = quietly(lambda: WAN.generate(pipe))
    second = quietly(lambda: WAN.generate(twin))
    # Nothing is known of the twin's scheduler: neither does its solver leap, nor are forecasts corrected.
    assert torch.equal(first, second) != session._hooked[0].needs.correct
    one, other = ([(r.index, r.branch, r.action) for r in report.steps] for report in session.reports)
    assert [(index, branch, action.replace("leap", "forecast")) for index, branch, action in one] == other
    unicp.restore(twin)
    assert torch.equal(WAN.generate(pipe), plain("wan"))


def test_a_transformer_that_two_pipelines_share_is_accelerated_through_both() -> None:
    pipe, twin = WAN.build(), WAN.build()
    twin.transformer = pipe.transformer
    first = unicp.accelerate(pipe, unicp.ScheduleConfig(interval=2))
    quietly(lambda: WAN.generate(pipe))
    with pytest.warns(unicp.UnicpWarning, match="shared by two pipelines"):
        second = unicp.accelerate(twin, unicp.ScheduleConfig(interval=3))
    quietly(lambda: WAN.generate(pipe))
    with pytest.warns(unicp.UnicpWarning, match="earlier video: transformer is shared by two pipelines"):
        assert first.report().timeline()["cond"].startswith("###.#.#")
    with warnings.catch_warnings():
        warnings.simplefilter("error", unicp.UnicpWarning)
        assert len(second.reports) == 1 and second.report().timeline()["cond"].startswith("##.#")
        unicp.accelerate(twin, unicp.ScheduleConfig(interval=2))
    unicp.restore(twin)


@methods
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_few_steps(config: Config, steps: int) -> None:
    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    latents = quietly(lambda: WAN.generate(pipe, steps=steps))
    assert bool(latents.isfinite().all())
    report = quietly(session.report)
    assert report.count == steps
    assert report.steps[0].action == report.steps[1].action == "compute"


@methods
def test_an_attention_processor_set_afterwards(config: Config) -> None:
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Doubling(WanAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 2

    def changed(pipe: Any) -> torch.Tensor:
        pipe.transformer.set_attn_processor(Doubling())
        latents: torch.Tensor = quietly(lambda: WAN.generate(pipe))
        return latents

    before, after = WAN.build(), WAN.build()
    unicp.accelerate(after, config)
    pipe = WAN.build()
    pipe.transformer.set_attn_processor(Doubling())
    unicp.accelerate(pipe, config)
    wanted = quietly(lambda: WAN.generate(pipe))
    assert torch.equal(changed(after), wanted)
    assert not torch.equal(changed(before), plain("wan"))


@methods
def test_fused_projections(config: Config) -> None:
    pipe, twin = WAN.build(), WAN.build()
    unicp.accelerate(pipe, config)
    for each in (pipe, twin):
        each.transformer.fuse_qkv_projections()
    unicp.accelerate(twin, config)
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), quietly(lambda: WAN.generate(twin)))


@methods
@pytest.mark.parametrize("refused", ["profile", "spec", "interrupt"])
def test_a_refused_acceleration_leaves_the_one_before(
    config: Config, refused: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = WAN.build()
    bare = traces(pipe.transformer)
    session = unicp.accelerate(pipe, config)
    before, video = hooked(pipe.transformer), quietly(lambda: WAN.generate(pipe))
    with pytest.raises((UnicpError, KeyboardInterrupt)):
        if refused == "profile":
            unicp.accelerate(pipe, unicp.UniCPConfig(profile=str(tmp_path / "none.safetensors")))
        elif refused == "spec":
            unknown = BlockList(path="layers", residuals={"mlp": None})
            spec = unicp.ModelSpec(family="toy", classes=(), block_lists=(unknown,), frames=lambda *_: 1)
            unicp.accelerate(pipe.transformer, unicp.AdaCacheConfig(metric_kind="mlp"), spec=spec)
        else:
            made, real = [], session_module.HookedDenoiser

            def once_interrupted(*arguments: Any) -> Any:
                made.append(real(*arguments))
                if len(made) == 1:
                    made[0].remove()
                    raise KeyboardInterrupt
                return made[-1]

            monkeypatch.setattr(session_module, "HookedDenoiser", once_interrupted)
            unicp.accelerate(pipe, "adacache")
    assert hooked(pipe.transformer) == before
    assert torch.equal(quietly(lambda: WAN.generate(pipe)), video)
    assert len(session.reports) == 2 and not session.cached_tensors()
    session.restore()
    assert traces(pipe.transformer) == bare


def hooked(model: torch.nn.Module) -> dict[str, Any]:
    """What stands on a model, whichever session put it there."""
    return {name: repr(type(value)) if name.endswith(".forward") else value for name, value in traces(model).items()}


def test_a_refused_acceleration_of_one_of_two_denoisers(tmp_path: Path) -> None:
    two = FAMILIES["wan2.2"]
    pipe, twin = two.build(), two.build()
    sessions = [unicp.accelerate(each, METHODS["adacache"]) for each in (pipe, twin)]
    missing = unicp.UniCPConfig(profile=str(tmp_path / "none.safetensors"))
    with pytest.raises(UnicpError, match="there is no profile"):
        unicp.accelerate(pipe.transformer_2, missing)
    assert torch.equal(*(quietly(lambda each=each: two.generate(each)) for each in (pipe, twin)))
    one, other = ([(r.index, r.denoiser, r.action) for r in each.report().steps] for each in sessions)
    assert one == other and len(sessions[0].reports) == 1


def test_an_acceleration_that_cannot_be_put_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise UnicpError("no more hooks")

    pipe = WAN.build()
    unicp.accelerate(pipe, unicp.UniCPConfig(delta=0.5))
    monkeypatch.setattr(session_module, "HookedDenoiser", broken)
    with (
        pytest.warns(UnicpWarning, match=r"unicp that was in force could not be put back: no more hooks"),
        pytest.raises(UnicpError, match=r"no more hooks"),
    ):
        unicp.accelerate(pipe, "adacache")
    monkeypatch.undo()
    assert torch.equal(WAN.generate(pipe), plain("wan"))


def test_a_session_keeps_the_last_reports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicp.hosts.diffusers.session.KEPT_REPORTS", 3)
    pipe = WAN.build()
    session = unicp.accelerate(pipe, METHODS["adacache"])
    kept = []
    for steps in (5, 6, 7, 8, 9):
        quietly(lambda steps=steps: WAN.generate(pipe, steps=steps))
        kept.append(weakref.ref(session.report()))
    gc.collect()
    assert [report.count for report in session.reports] == [7, 8, 9]
    assert [report() is None for report in kept] == [True, True, False, False, False]


def test_a_session_that_was_left_keeps_no_model() -> None:
    pipe = WAN.build()
    with unicp.accelerate(pipe, METHODS["adacache"]) as session:
        quietly(functools.partial(WAN.generate, pipe))
    model = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert model() is None and session.report().steps


@methods
def test_many_runs_of_changing_requests_equal_fresh_ones(config: Config) -> None:
    name = {id(v): k for k, v in METHODS.items()}[id(config)]
    full = {"adacache": "adacache-residual", "forecast": "adacache-forecast", "unicp": "unicp-online"}
    pipe = WAN.build()
    session = unicp.accelerate(pipe, config)
    requests: list[dict[str, Any]] = [{}, {"steps": 7}, {"size": 48}, {"frames": 5}, {"guidance": False}, {"seed": 3}]
    for request in [*requests, {}]:
        latents = quietly(lambda request=request: WAN.generate(pipe, **request))
        assert torch.equal(latents, fresh("wan", full.get(name, "budget-default"), **request)[0])
        assert not session.cached_tensors()
    assert len(session.reports) == len(requests) + 1


@pytest.mark.parametrize(
    "config",
    [
        unicp.AdaCacheConfig(codebook=((1e6, 3),)),
        unicp.UniCPConfig(delta=1e6, max_window=2),
        unicp.BudgetConfig(target_speedup=1.6, warmup_steps=2, override_reserve=0.1),
    ],
    ids=lambda config: config.method,
)
def test_a_measurement_that_is_no_number_computes_and_is_said(config: Any) -> None:
    """From step 4 on the model makes NaN: whatever was planned before, nothing is reused once that was measured."""
    pipe = FAMILIES["wan"].build()
    session = unicp.accelerate(pipe, config)

    def poison(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if session.records and session.records[-1].index >= 3 else output

    broken = pipe.transformer.blocks[1].attn1.to_out[0].register_forward_hook(poison)
    FAMILIES["wan"].generate(pipe)
    broken.remove()
    report = session.report()
    assert any("were not finite numbers" in note for note in report.notes)
    first = min(r.index for r in report.steps if r.index >= 4 and r.action in ("compute", "partial"))
    late = [r for r in report.steps if r.index > first]
    assert late and all(r.action != "reuse" and r.action != "forecast" for r in late)
    assert not any(action == "reuse" for r in late for name, action in r.units.items() if name == "blocks.1.attn1")


@pytest.mark.slow
@pytest.mark.usefixtures("only_new_objects")  # other tests keep some
@methods
def test_two_hundred_runs_keep_nothing(config: Config) -> None:
    pipe = WAN.build()
    for number in range(200):
        session = unicp.accelerate(pipe, config)
        quietly(lambda number=number: WAN.generate(pipe, size=(32, 48)[number % 2], steps=4 + number % 5))
        assert not session.cached_tensors()
    unicp.restore(pipe)
    assert torch.equal(WAN.generate(pipe), plain("wan"))
    gc.collect()
    ours = [o for o in gc.get_objects() if str(type(o).__module__).startswith(("unicp.engine", "unicp.hosts"))]
    assert len(ours) < 100
