"""Calibration: what it measures against a literal measurement, that it loses nothing, and whom its profiles serve."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import unicp
from tests.contract import config_on, profile_of, quietly
from tests.reference.unicp_literal import sliced_attention
from tests.tiny import FAMILIES
from unicp import Profile, UniCPConfig, cli
from unicp.engine.slicing.attention import basis
from unicp.engine.slicing.instrumented import instrumented
from unicp.errors import UnicpError
from unicp.offline import inspect
from unicp.offline.recorders import ErrorRecorder
from unicp.profiles.identity import fingerprint

WAN = FAMILIES["wan"]
CONFIG = UniCPConfig(delta=0.05, delta_prune=0.9, max_window=3, pcas=True)


def calibrated(family: str = "wan", pipe: Any = None, **more: Any) -> Profile:
    chosen = FAMILIES[family]
    more = {"config": CONFIG, "progress": False, **more}
    profile: Profile = chosen.run(
        pipe or chosen.build(), lambda run, **call: unicp.calibrate(run, None, **call), **more
    )
    return profile


def outputs_of(pipe: Any, run: Callable[[], Any]) -> dict[str, list[torch.Tensor]]:
    """Every output of every attention module and MLP of Wan, in the order of the calls (branches alternate)."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for i, block in enumerate(pipe.transformer.blocks):
        for name in ("attn1", "attn2", "ffn"):
            outputs = found.setdefault(f"blocks.{i}.{name}", [])
            handles.append(
                getattr(block, name).register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out))
            )
    run()
    for handle in handles:
        handle.remove()
    return found


def test_the_errors_are_those_of_a_literal_measurement() -> None:
    pipe = WAN.build()
    profile = calibrated(pipe=pipe)
    outputs = outputs_of(pipe, lambda: WAN.generate(pipe))
    assert len(outputs) == 9
    for unit, calls in outputs.items():
        mean, most = (profile.tensors[f"transformer/{unit}/cache_{kind}"] for kind in ("mean", "max"))
        assert mean.shape == (10, 3)
        for t in range(10):
            for k in (1, 2, 3):
                if t + k >= 10:
                    assert mean[t, k - 1] == most[t, k - 1] == float("inf")
                    continue
                changes = []
                for branch in (0, 1):
                    old, new = calls[2 * t + branch], calls[2 * (t + k) + branch]
                    changes.append(float((new - old).abs().sum() / old.abs().sum()))
                assert mean[t, k - 1] == pytest.approx(sum(changes) / 2, rel=1e-5)
                assert most[t, k - 1] == pytest.approx(max(changes), rel=1e-5)


def test_slicing_errors_are_those_of_the_literal_attention() -> None:
    pipe = WAN.build()
    profile = calibrated(pipe=pipe, config=CONFIG.replace(delta=1e-9, warmup_steps=1, cooldown_steps=0))
    part = profile.of("transformer")
    # At delta zero every step is uncached; six of the ten, evenly spaced, are measured.
    steps = [0, 2, 4, 5, 7, 9]
    module = pipe.transformer.blocks[1].attn1
    p_qk, p_v = (basis(moment, 4) for moment in part.moments("blocks.1.attn1") or ())
    found: list[float] = []

    def attend(call: Any, heads_first: bool, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        full = call(query, key, value, *args, **kwargs)
        heads = (t.transpose(1, 2) for t in (query, key, value))
        sliced = sliced_attention(*heads, p_qk, p_v).float().transpose(1, 2)
        a, b = (module.to_out[0](out.flatten(2)) for out in (sliced, full))
        found.append(float((a - b).abs().sum() / b.abs().sum()))
        return full

    own = module.processor
    module.processor = instrumented(own, attend)
    WAN.generate(pipe)
    module.processor = own
    literal = [found[2 * step + branch] for step in steps for branch in (0, 1)]
    assert part.slicing("blocks.1.attn1")[4][0] == pytest.approx(sum(literal) / len(literal), rel=1e-3)
    assert part.slicing("blocks.1.attn1")[12][0] < 1e-5


def test_a_sample_of_tokens_estimates_the_errors() -> None:
    exact, estimate = calibrated(), calibrated(tokens=9)
    name = "transformer/blocks.0.attn1/cache_mean"
    a, b = exact.tensors[name][:-1, 0], estimate.tensors[name][:-1, 0]
    assert not torch.equal(a, b)
    assert bool(((a - b).abs() / a < 0.5).all())


@pytest.mark.parametrize("family", ["wan2.2", "latte", "hunyuan-video", "ltx"])
def test_what_will_be_kept_is_said_before(
    family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[int] = []
    own = ErrorRecorder.unwatch

    def watched(self: ErrorRecorder) -> None:
        branches = {branch for _, branch in self._history}
        held = [t for history in self._history.values() for *_, outputs in history for t in outputs]
        kept.append(sum(t.numel() * t.element_size() for t in held) // (len(branches) * self.batch))
        own(self)

    monkeypatch.setattr(ErrorRecorder, "unwatch", watched)
    chosen, config = FAMILIES[family], unicp.UniCPConfig(max_window=2, pcas=True)
    pipe = chosen.build()
    chosen.run(pipe, lambda run, **call: unicp.calibrate(run, None, config=config, tokens=4, progress=True, **call))
    said = re.search(
        r"keeps at most ([\d.]+) (B|KiB|MiB) for each guidance branch of a video, on cpu", capsys.readouterr().err
    )
    assert said is not None
    most = float(said[1]) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[said[2]]
    assert most / 1.6 <= sum(kept[: len(chosen.denoisers)]) <= 1.01 * most


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    whole = calibrated()
    checkpoint = tmp_path / "part.safetensors"

    def interrupt(what: str, step: int, count: int) -> None:
        if what.startswith("run 3") and step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(checkpoint=checkpoint, progress=interrupt)
    assert checkpoint.exists()
    seen: list[str] = []
    rest = calibrated(checkpoint=checkpoint, progress=lambda what, *_: seen.append(what))
    assert set(seen) == {"run 3 of 3"}
    assert not checkpoint.exists()
    assert whole.tensors.keys() == rest.tensors.keys()
    assert all(torch.equal(whole.tensors[name], rest.tensors[name]) for name in whole.tensors)
    with pytest.raises(KeyboardInterrupt):
        calibrated(checkpoint=checkpoint, progress=interrupt)
    with pytest.raises(UnicpError, match="unfinished calibration of another model, prompts or arguments"):
        calibrated(checkpoint=checkpoint, config=CONFIG.replace(max_window=4))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must be a list"),
        ("a ball", "prompts must be a list of prompts, got 'a ball'"),
        (3, "prompts must be a list of prompts, got 3"),
        (["a ball", 3], "a prompt must be text, got 3"),
    ],
)
def test_wrong_prompts_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(UnicpError, match=message):
        unicp.calibrate(WAN.build(), prompts)
    with pytest.raises(UnicpError, match=message):
        unicp.tune(WAN.build(), prompts)


def test_a_prompt_beside_the_prompts_is_refused() -> None:
    with pytest.raises(UnicpError, match="prompts are given already; leave prompt out"):
        unicp.tune(WAN.build(), ["a ball"], prompt="a cube")


def test_only_a_plain_pipeline_is_calibrated() -> None:
    pipe = WAN.build()
    with pytest.raises(UnicpError, match="give prompts, or prompts=None and prompt_embeds"):
        unicp.calibrate(pipe, None)
    with pytest.raises(UnicpError, match="pass the pipeline, not its transformer"):
        unicp.calibrate(pipe.transformer, ["a"])
    unicp.accelerate(pipe, CONFIG)
    with pytest.raises(UnicpError, match=r"the pipeline is accelerated.*unicp.restore"):
        unicp.calibrate(pipe, ["a"])


# --- whom a profile serves --------------------------------------------------------------------------------------------


def test_another_model_is_refused() -> None:
    config = config_on("wan", "unicp-windows")
    with pytest.raises(UnicpError, match="made on a WanTransformer3DModel, this is a LTXVideoTransformer3DModel"):
        unicp.accelerate(FAMILIES["ltx"].build(), config)
    from tests.tiny import wan_transformer

    with pytest.raises(UnicpError, match=r"another WanTransformer3DModel \(fingerprint"):
        unicp.accelerate(wan_transformer(layers=2), config)
    assert unicp.accelerate(wan_transformer(seed=5), config)  # other weights of the same model may well be a fine-tune


class _Packed(torch.nn.Linear):
    """Eight bits a weight behind a scale for each row, in one row of bytes: as bitsandbytes and GGUF pack theirs."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        bytes_ = torch.cat([(plain.weight.detach() / scale).round().to(torch.int8).view(torch.uint8).flatten(),
                            scale.view(torch.uint8).flatten()])  # fmt: skip
        self.weight = torch.nn.Parameter(bytes_[:, None], requires_grad=False)
        self.bias = plain.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        packed, rows = self.weight[:, 0], 4 * self.out_features
        weight = packed[:-rows].view(torch.int8).view(self.out_features, self.in_features)
        return torch.nn.functional.linear(hidden, weight * packed[-rows:].view(torch.float32)[:, None], self.bias)


def test_a_quantised_twin_is_served() -> None:
    pipe = WAN.build()
    before = fingerprint(pipe.transformer)
    for module in list(pipe.transformer.blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, _Packed(child))
    pipe.transformer.register_to_config(quantization_config={"quant_method": "packed"})
    table = torch.nn.Parameter(torch.zeros(1, 6, 30), requires_grad=False)
    table.quant_shape = torch.Size(pipe.transformer.blocks[0].scale_shift_table.shape)  # type: ignore[attr-defined]
    whole, pipe.transformer.blocks[0].scale_shift_table = pipe.transformer.blocks[0].scale_shift_table, table
    assert fingerprint(pipe.transformer) == before
    pipe.transformer.blocks[0].scale_shift_table = whole
    plain_video = WAN.generate(pipe)
    for name, done in (("unicp-windows", "reuse"), ("unicp-switch", "slice")):
        with unicp.accelerate(pipe, config_on("wan", name)) as session:
            video = WAN.generate(pipe)
            assert session.report().unit_counts()[done]
        assert 0 < (video - plain_video).norm() < 0.5 * plain_video.norm()
    # Of the same number of parameters, and yet another model.
    pipe.transformer.blocks[0].ffn.net[2].in_features //= 2
    assert fingerprint(pipe.transformer) != before


def test_another_scheduler_is_refused() -> None:
    pipe = WAN.build()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UnicpError, match="made with a UniPCMultistepScheduler, this pipeline has a FlowMatchEuler"):
        unicp.accelerate(pipe, config_on("wan", "unicp-windows"))


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "on a budget"])
def test_another_scheduler_is_refused_after_accelerate_too(stacked: bool) -> None:
    pipe, config = WAN.build(), config_on("wan", "unicp-windows")
    scheduler = pipe.scheduler
    with unicp.accelerate(pipe, config.replace(stack=unicp.BudgetConfig()) if stacked else config):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler()
        with pytest.raises(UnicpError, match="made with a UniPCMultistepScheduler, this pipeline has a FlowMatchEuler"):
            WAN.generate(pipe, steps=4)
        pipe.scheduler = scheduler
        quietly(lambda: WAN.generate(pipe, steps=4))


@pytest.mark.parametrize("steps", [6, 10, 23])
def test_other_step_counts_are_served(steps: int) -> None:
    pipe = WAN.build()
    config = config_on("wan", "unicp-windows").replace(delta=0.03, delta_mlp=0.0)
    session = unicp.accelerate(pipe, config)
    quietly(lambda: WAN.generate(pipe, steps=steps))
    report = quietly(session.report)
    reused = report.unit_counts().get("reuse", 0)
    assert 0 < reused < steps * 2 * 6


def test_a_profile_by_its_path_finds_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "wan.safetensors"
    calibrated(config=CONFIG.replace(delta=0.5)).save(path)
    session = unicp.accelerate(WAN.build(), path)
    assert session.config.profile == str(path)
    assert session.config.delta == 0.5
    assert not Profile.load(path).config.profile  # a file that is moved still holds together


# --- the command line -------------------------------------------------------------------------------------------------


def test_calibrate_then_generate_then_inspect(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    small = ["--model", str(wan_folder), "--size", "48x32", "--frames", "5", "--steps", "8"]
    settings = ["--set", "delta=0.4", "--set", "delta_prune=0.9", "--set", "pcas=true"]
    assert cli.main(["calibrate", "a red ball", "a blue star", *small, *settings, "-o", "tiny.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "wrote tiny.safetensors" in said and "unicp inspect tiny.safetensors" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.safetensors"]

    for method in (["tiny.safetensors"], ["unicp", "--set", "profile=tiny.safetensors", "--set", "delta=0.4"]):
        assert cli.main(["generate", "a red ball", *small, "--method", *method, "-o", "out.mp4"]) == 0
        said = capsys.readouterr().out
        assert "modules in partial calls" in said
        record = json.loads(Path("out.json").read_text())
        assert record["config"]["profile"] == "tiny.safetensors"
        assert any(step["units"] for step in record["report"]["steps"])

    assert cli.main(["inspect", "tiny.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "self_attention" in said and "slicing error by rank" in said and "plan at delta 0.4" in said
    assert max(len(line) for line in said.splitlines()) <= 80
    for what in ("curves", "errors", "slicing"):
        assert Path(f"tiny-{what}.png").stat().st_size > 5000
    assert cli.main(["inspect", "out.mp4"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a red ball\nunicp: 8 of 8")
    assert "blocks.0.attn1" in said

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    assert cli.main(["inspect", "tiny.safetensors"]) == 0
    captured = capsys.readouterr()
    assert "plan at delta 0.4" in captured.out and "no figures: figures need matplotlib" in captured.err
    assert cli.main(["inspect", "tiny.safetensors", "-o", "figures"]) == 2
    assert "pip install 'unicp[plots]'" in capsys.readouterr().err and not Path("figures").exists()


@pytest.mark.usefixtures("by_steps")
def test_tune_then_generate_then_inspect(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    small = ["--model", str(wan_folder), "--size", "48x32", "--frames", "5", "--steps", "12"]
    tune = ["tune", "a red ball", "a blue star", *small, "--effort", "low", "--target-speedup", "1.5"]
    assert cli.main([*tune, "--leap", "0.5", "-o", "plans.safetensors"]) == 0
    assert unicp.Profile.load("plans.safetensors").config == unicp.BudgetConfig(target_speedup=1.5, leap=0.5)
    said = capsys.readouterr()
    assert "about as long as" in said.err and "wrote plans.safetensors" in said.out
    assert [p.name for p in tmp_path.iterdir()] == ["plans.safetensors"]
    assert cli.main(["generate", "a red ball", *small, "--method", "plans.safetensors", "-o", "out.mp4"]) == 0
    assert "budget:" in capsys.readouterr().out
    assert json.loads(Path("out.json").read_text())["config"]["profile"] == "plans.safetensors"
    settings = ["--set", "profile=plans.safetensors", "--set", "target_speedup=1.2"]
    assert cli.main(["generate", "a red ball", *small, "--method", "budget", *settings, "-o", "out.mp4"]) == 0
    settings = ["--set", "min_psnr=30"]  # in place of the profile's target
    assert (
        cli.main(["generate", "a red ball", *small, "--method", "plans.safetensors", *settings, "-o", "out.mp4"]) == 0
    )
    asked = json.loads(Path("out.json").read_text())["config"]
    assert asked["min_psnr"] == 30 and asked["target_speedup"] is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # a plan is text
    assert cli.main(["inspect", "plans.safetensors", "-o", "figures"]) == 0
    said_lines = capsys.readouterr().out.splitlines()
    assert any("#" in line and "dB" in line for line in said_lines)
    assert max(len(line) for line in said_lines) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "-o", "x.pt"], "-o x.pt must end in .safetensors"),
        (["calibrate", "-o", "nowhere/x.safetensors"], "there is no folder nowhere"),
        (["calibrate", "-o", "x.safetensors", "--model", "here"], "give a few prompts"),
        (["calibrate", "a", "-o", "x.safetensors", "--set", "dleta=1"], "Did you mean 'delta'?"),
        (["tune", "-o", "x.safetensors", "--target-speedup", "0.5"], "target_speedup must be a number of at least 1"),
        (["tune", "-o", "x.safetensors", "--target-speedup", "2", "--min-psnr", "3"], "not both"),
        (["tune", "-o", "x.safetensors", "--effort", "huge"], "--effort must be one of low, medium, high"),
        (["inspect", "x.safetensors"], "there is no profile x.safetensors"),
        (["inspect", "x.mp4"], "there is no x.json"),
        (["inspect", "schedule.safetensors"], "holds a plan for schedule"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    about = {"denoisers": {"transformer": {}}}
    Profile(config=unicp.ScheduleConfig(interval=2), metadata=about).save("schedule.safetensors")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_text_is_empty_of_nothing_it_should_say() -> None:
    said = inspect.text(Profile.load(profile_of("latte")))
    for kind in ("spatial_attention", "temporal_attention", "cross_attention", "mlp"):
        assert kind in said
    assert max(len(line) for line in said.splitlines()) <= 80
