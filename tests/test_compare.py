"""``unicp.compare`` on a tiny real pipeline: every peer, isolation, going on after an interruption, the page."""

from __future__ import annotations

import html
import json
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import WanPipeline

import unicp
from tests import tiny
from tests.contract import quietly
from tests.tiny import FAMILIES
from unicp import AdaCacheConfig, ScheduleConfig, UnicpError, cli
from unicp.bench import compare as module
from unicp.bench import provenance, quality
from unicp.bench.diffusers_peers import MagCache, patterns
from unicp.bench.harness import generate
from unicp.bench.isolation import fresh
from unicp.bench.observe import observing
from unicp.bench.peers import Ours, Peer, Run, known, resolve
from unicp.bench.report import _timeline
from unicp.policies import config_types

PROMPTS = ["a red ball bouncing", "a blue star"]
CALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 6, "guidance_scale": 3.0}
FEW: dict[str, Any] = {**CALL, "num_inference_steps": 3}
"""Where it does not matter what the videos are."""


def frames(pipe: Any) -> np.ndarray:
    made: np.ndarray = generate(pipe, {"prompt": PROMPTS[0], **CALL}, seed=0).frames
    return made


class Broken(Peer):
    name, source, knob, grid = "broken", "nobody", "strength", (1, 2)

    def apply(self, run: Run, label: str) -> Any:
        if label.endswith("2"):
            raise TypeError("it cannot be done\nand more")
        return run.call


class Late(Peer):
    name, source, knob, grid = "late", "nobody", "strength", (1, 2)

    def apply(self, run: Run, label: str) -> Any:
        if label.endswith("1") and run.call["prompt"] == PROMPTS[1]:
            raise TypeError("not with this prompt")
        return run.call


@pytest.fixture(scope="module")
def all_of_them(pipe: Any) -> Any:
    """Everything that is known, with few points each, on one prompt."""
    few = {"first-block-cache": (0.2,), "taylorseer": (2,), "pab": (2,), "fastercache": (2,), "magcache": (0.5,)}
    few |= {"seacache": (0.9,), "cache-dit-dbcache": (0.2,), "cache-dit-taylorseer": (0.2,), "fewer-steps": (0.5,)}
    few["control"] = ("again",)
    chosen: list[Peer] = []
    for kind in config_types().values():
        for name, configs in kind.curves(CALL["num_inference_steps"]).items():
            chosen.append(Ours(name, dict(list(configs.items())[-1:])))
    chosen += [type(known()[name]())(values) for name, values in few.items()]
    call = {**CALL, "num_inference_steps": 4}
    return unicp.compare(pipe, [*chosen, Broken()], PROMPTS[:1], progress=False, **call)


def test_every_peer_has_a_point_or_its_own_error(all_of_them: Any) -> None:
    found = {point.method for point in all_of_them.points} | {failure.method for failure in all_of_them.failures}
    assert found == {*known(), "broken"}
    working = {point.method for point in all_of_them.points}
    assert working >= {"adacache", "schedule", "fewer-steps", "first-block-cache", "magcache", "taylorseer", "pab"}
    errors = {failure.method: failure.error for failure in all_of_them.failures}
    assert errors["broken"] == "TypeError: it cannot be done"
    assert all(errors.values())


def test_peers_that_run_do_skip(all_of_them: Any) -> None:
    fractions = {row.method: row.computed_fraction for row in all_of_them.rows()}
    assert fractions["fewer-steps"] == pytest.approx(0.5)
    assert fractions["taylorseer"] < 0.95 and fractions["pab"] < 0.95 and fractions["magcache"] < 0.95
    assert fractions["control"] == 1
    for row in all_of_them.rows():
        assert row.computed_fraction is not None and 0 < row.computed_fraction <= 1.001, row.name


def test_a_method_whose_slowest_point_is_faster_than_asked_counts_with_that_one(all_of_them: Any) -> None:
    slow, fast = all_of_them.at_speedup(1e-3), all_of_them.at_speedup(1e3)
    low = all_of_them.at_speedup(1e-3, worst=True)
    for name, rows in all_of_them.curves().items():
        psnr = rows[0].quality["psnr"]
        assert (slow[name], low[name]) == ((None, None) if rows[0].identical else (psnr.value, psnr.worst))
        assert fast[name] is None
    assert slow["fewer-steps"] is not None and slow["control"] is None


def test_the_control_is_identical(all_of_them: Any) -> None:
    """Nothing of the peers that ran before it reached its pipeline."""
    control = next(row for row in all_of_them.rows() if row.method == "control")
    assert control.quality["psnr"].value == 100 and control.quality["latent_change"].value == 0


def test_nothing_of_a_peer_stays(pipe: Any, all_of_them: Any) -> None:
    assert "_is_cached" not in vars(WanPipeline) and not hasattr(WanPipeline, "_original_call")
    assert not pipe.transformer.is_cache_enabled
    for each in pipe.transformer.modules():
        assert not each._forward_hooks and not each._forward_pre_hooks
        assert not getattr(getattr(each, "_diffusers_hook", None), "hooks", None)


@pytest.mark.slow
def test_computing_everything_is_identical(pipe: Any) -> None:
    everything = {"all": ScheduleConfig(interval=1), "half": ScheduleConfig(interval=2, warmup_steps=1)}
    comparison = unicp.compare(pipe, everything, PROMPTS, repeats=2, progress=False, **CALL)
    rows = {row.method: row for row in comparison.rows()}
    assert rows["all"].quality["psnr"].value == 100 and rows["all"].quality["latent_change"].value == 0
    assert rows["all"].computed_fraction == 1
    assert rows["half"].computed_fraction == pytest.approx(0.5)
    assert rows["half"].quality["psnr"].value < 100 and rows["half"].quality["psnr"].count == 2
    assert rows["half"].cache_bytes > 0 and rows["half"].peak_bytes > 0
    shares = [call["share"] for call in comparison.points[1].observed["calls"] if call["branch"] == 0]
    assert [share > 0.5 for share in shares] == [True, False] * 3
    assert len(comparison.points[0].results) == 4


def test_a_setting_that_fails_is_not_run_again(pipe: Any) -> None:
    seen: list[module.Progress] = []
    comparison = unicp.compare(pipe, [Late()], PROMPTS, repeats=2, progress=seen.append, **FEW)
    assert [(failure.label, failure.error) for failure in comparison.failures] == [
        ("strength=1", "TypeError: not with this prompt")
    ]
    assert [point.label for point in comparison.points] == ["strength=2"]
    assert len(comparison.points[0].results) == 4
    assert [at.what for at in seen].count("late strength=1") == 3  # discarded, timed, failed
    assert seen[-1].done == seen[-1].total == 5 + 3 + 5


def test_a_twin_shares_weights_and_nothing_else(pipe: Any) -> None:
    before = frames(pipe)
    twin = fresh(pipe)
    assert type(twin) is not type(pipe) and type(twin).__name__ == type(pipe).__name__
    assert twin.transformer is not pipe.transformer and twin.scheduler is not pipe.scheduler
    mine, its = (dict(each.transformer.named_parameters()) for each in (pipe, twin))
    assert all(mine[name] is its[name] for name in mine)
    type(twin).__call__ = lambda *args, **kwargs: None  # as cache-dit would
    unicp.accelerate(twin, ScheduleConfig(interval=3))
    assert np.array_equal(frames(pipe), before)
    assert np.array_equal(frames(fresh(pipe)), before)


def test_a_pipeline_that_is_offloaded_model_by_model(pipe: Any, request: pytest.FixtureRequest) -> None:
    """The same figures as without, and afterwards the pipeline is offloaded as before."""
    methods = {"half": ScheduleConfig(interval=2)}
    wanted = unicp.compare(pipe, methods, PROMPTS[:1], progress=False, **FEW)
    before = frames(pipe)
    request.addfinalizer(pipe.remove_all_hooks)
    pipe.enable_model_cpu_offload(device="cpu")
    hooked = type(pipe.transformer._hf_hook)
    found = unicp.compare(pipe, methods, PROMPTS[:1], progress=False, **FEW)
    assert not found.failures
    (a,), (b,) = (each.rows() for each in (wanted, found))
    assert a.computed_fraction == b.computed_fraction and a.quality.keys() == b.quality.keys()
    for name, figure in a.quality.items():  # where weights lie in memory changes the last bits on some machines
        other = b.quality[name]
        assert other == figure or (other and figure and other.value == pytest.approx(figure.value, rel=1e-5))
    assert type(pipe.transformer._hf_hook) is hooked and len(pipe._all_hooks) == 3
    assert np.allclose(frames(pipe), before, rtol=0, atol=1e-6)


def test_a_pipeline_that_is_offloaded_part_by_part_is_refused(pipe: Any) -> None:
    twin = fresh(pipe)
    accelerate.cpu_offload(twin.transformer, "cpu")
    with pytest.raises(UnicpError, match="enable_model_cpu_offload"):
        unicp.compare(twin, ["adacache"], PROMPTS, progress=False, **CALL)


def test_figures_survive_json(all_of_them: Any, tmp_path: Path) -> None:
    path = all_of_them.save(tmp_path / "figures.json")
    loaded = unicp.Comparison.load(path)
    assert str(loaded) == str(all_of_them)
    assert json.loads(path.read_text())["provenance"]["environment"]["versions"]["diffusers"]


# --- refusals -------------------------------------------------------------------------------------------------------


def test_an_accelerated_pipeline_is_refused(pipe: Any) -> None:
    with unicp.accelerate(pipe, AdaCacheConfig()), pytest.raises(UnicpError, match="compare needs the bare pipeline"):
        unicp.compare(pipe, ["adacache"], PROMPTS, progress=False, **CALL)


@pytest.mark.parametrize(
    ("configs", "prompts", "more", "message"),
    [
        (["adacash"], PROMPTS, {}, "Did you mean 'adacache'"),
        ([], PROMPTS, {}, "nothing to compare"),
        (["adacache", AdaCacheConfig()], PROMPTS, {}, "asked for twice"),
        (["first-block-cache=much"], PROMPTS, {}, "give numbers for its threshold"),
        (["adacache=1"], PROMPTS, {}, "takes no values"),
        (["adacache"], None, {}, "compare needs prompts"),
        (["adacache"], [], {}, "at least one prompt"),
        (["adacache"], PROMPTS, {"repeats": 0}, "repeats must be 1 or more"),
        (["adacache"], PROMPTS, {"output_type": "pil"}, "sets output_type itself"),
    ],
)
def test_refusals(pipe: Any, configs: Any, prompts: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnicpError, match=message):
        unicp.compare(pipe, configs, prompts, progress=False, **{**CALL, **more})


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_taylorseer_patterns_match_real_modules(name: str) -> None:
    denoiser = tiny.FAMILIES[name].build().transformer
    found = [key for key, _ in denoiser.named_modules() for p in patterns(denoiser) if re.fullmatch(p, key)]
    kinds = {key.rpartition(".")[2] for key in found}
    assert "attn1" in kinds and kinds & {"ffn", "ff"}
    assert len(found) == tiny.LAYERS * len(kinds)


def test_magcache_is_calibrated_for_the_number_of_steps(pipe: Any) -> None:
    run = Run(fresh(pipe), {"prompt": PROMPTS[0], **CALL})
    ratios = MagCache().calibrate(run, lambda twin, call: generate(twin, call, seed=0))
    assert len(ratios) == CALL["num_inference_steps"] and all(0 < ratio < 10 for ratio in ratios)


def test_a_method_of_ours_is_found_by_its_registry() -> None:
    assert {"adacache", "adacache-forecast", "schedule", "unicp"} <= {peer.name for peer in resolve(None) if peer.ours}


# --- the page and the command ---------------------------------------------------------------------------------------


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.data = ""
        self.inside = False

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.found += [value for name, value in attributes if name in ("src", "href", "action", "poster") and value]
        self.inside = tag == "script" and ("id", "data") in attributes

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.data += data


def test_the_page_needs_nothing_else(all_of_them: Any, tmp_path: Path) -> None:
    page = all_of_them.report(tmp_path / "report.html").read_text()
    links = _Links()
    links.feed(page)
    assert not links.found and "@import" not in page and "url(" not in page
    for point in all_of_them.points:
        assert point.label in page
    assert "TypeError: it cannot be done" in page
    missing = quality.lpips_missing()  # empty where this machine has the weights
    assert all_of_them.notes == ((missing,) if missing else ())
    assert ("LPIPS<small>not measured</small>" in page) == bool(missing)
    assert missing in str(all_of_them) and html.escape(missing).replace("&#x27;", "&#39;") in page
    data = json.loads(links.data)
    names = {point["name"] for point in data["points"]}
    assert names == {all_of_them.baseline.name, *(point.name for point in all_of_them.points)}
    assert set(data["videos"]) == names
    assert data["layout"]["frames"] == 5


@pytest.mark.parametrize(
    ("module", "said"),
    [("mine.compare", "python -m mine.compare"), ("mine.__main__", "python -m mine"), (None, "compare.py")],
)
def test_the_command_is_one_that_can_be_typed(module: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somebody/mine/compare.py", "--prompts", "a ball"])
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert provenance.command() == f"{said} --prompts 'a ball'"


def test_prompts_cannot_break_the_page(pipe: Any, tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script>"
    comparison = unicp.compare(pipe, ["fewer-steps=3"], [nasty], progress=False, **CALL)
    page = comparison.report(tmp_path / "report.html").read_text()
    assert "<script>alert" not in page and page.count("</script>") == 2


@pytest.fixture
def command(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    sizes = ["--model", str(wan_folder), "--size", "48x32", "--frames", "5", "--steps", "6"]
    return lambda *arguments: cli.main(["compare", *arguments, *sizes])


def test_the_command(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "first-block-cache=0.2,fewer-steps=3", "--offload", "model"]
    assert command("a red ball", *methods, "--report", "out/page.html") == 0
    said = capsys.readouterr().out
    assert "first-block-cache threshold=0.2" in said and "fewer-steps steps=3" in said and "wrote out/page.html" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["page.html", "page.json", "page.sqlite"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a red ball", "--methods", "fewer-step"], "Did you mean 'fewer-steps'"),
        (["a red ball", "--report", "page.pdf"], "ends in .html"),
        (["a red ball", "--offload", "group"], "--offload model"),
        ([], "give a prompt"),
    ],
)
def test_the_command_refuses(
    command: Callable[..., int], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == cli.REFUSED
    assert message in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in known())


def test_embeddings_instead_of_prompts(pipe: Any) -> None:
    embeddings = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    call = {**CALL, "prompt_embeds": embeddings, "negative_prompt_embeds": -embeddings}
    comparison = unicp.compare(pipe, ["fewer-steps=3"], None, progress=False, **call)
    assert comparison.prompts == (None,) and len(comparison.points) == 1


def test_blocks_of_two_denoisers_are_drawn() -> None:
    """Each call ran blocks of its own denoiser; the page shows both lists."""
    family = FAMILIES["wan2.2"]
    pipe = family.build()
    unicp.accelerate(pipe, unicp.UniCPConfig(delta=1e6, delta_cross=0, delta_mlp=0, max_window=1))
    with observing(pipe) as (seen, end_step):
        quietly(lambda: family.generate(pipe, callback=lambda *_: end_step() or {}))
    observed = seen.to_dict()
    blocks = len(observed["blocks"])
    assert {call["first"] for call in observed["calls"]} == {0, blocks // 2}
    assert max(call["share"] for call in observed["calls"] if call["first"]) == 1
    drawn = _timeline(SimpleNamespace(name="unicp", observed=observed))  # type: ignore[arg-type]
    assert drawn.count('class="cell"') == (len(family.branches) + blocks) * 10
