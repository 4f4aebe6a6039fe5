"""What ``unicp generate`` refuses: each in one clear line, before it costs anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from unicp import demo, specs
from unicp.cli import pipelines

PROMPT = "a red ball bouncing"
Run = Callable[..., int]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def prepare(folder: Path) -> None:
    """The files that the refusals below speak of."""
    (folder / "empty").mkdir()
    (folder / "broken.safetensors").write_bytes(b"not a profile")
    save_file({"x": torch.zeros(1)}, folder / "weights.safetensors")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "notes.json").write_text("{}")
    for name, index in {
        "image": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "from-image": {"_class_name": "WanImageToVideoPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
        "future": {"_class_name": "WanPipelineOfTomorrow"},
        "unet": {"_class_name": "TextToVideoSDPipeline", "unet": ["diffusers", "UNet3DConditionModel"]},
        "damaged": {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
        "nameless": {},
    }.items():
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(json.dumps(index))


BEFORE_LOADING = {
    "no prompt": ([], "nothing to generate; give a prompt"),
    "empty prompt": (["  "], "a prompt is empty"),
    "no prompts file": (["--prompts-file", "none.txt"], "cannot read --prompts-file none.txt: No such file"),
    "prompts file in another code": (["--prompts-file", "latin.txt"], "latin.txt is not UTF-8 text"),
    "unknown method": (
        [PROMPT, "--method", "adacash"],
        "unknown method 'adacash'; known: none, adacache, budget, schedule",
    ),
    "near method": ([PROMPT, "--method", "adacash"], "Did you mean 'adacache'?"),
    "missing profile": ([PROMPT, "--method", "p.safetensors"], "there is no profile p.safetensors"),
    "broken profile": ([PROMPT, "--method", "broken.safetensors"], "broken.safetensors is not a readable profile"),
    "no profile": ([PROMPT, "--method", "weights.safetensors"], "is a safetensors file, but no unicp profile"),
    "bare schedule": ([PROMPT, "--method", "schedule"], "give exactly one of compute=(0, 1, 5, ...) and interval=2"),
    "negative threshold": (
        [PROMPT, "--method", "adacache", "--set", "codebook=[[-0.1, 3], [1, 1]]"],
        "must be a number of at least 0, got -0.1",
    ),
    "unsorted codebook": (
        [PROMPT, "--method", "adacache", "--set", "codebook=((0.5, 3), (0.1, 1))"],
        "thresholds of the codebook must rise",
    ),
    "unknown codebook": ([PROMPT, "--method", "adacache", "--set", "codebook=demo-51"], "Did you mean 'demo-50'?"),
    "unknown field": ([PROMPT, "--set", "more=1"], "unknown field of BudgetConfig 'more'"),
    "unfit field": ([PROMPT, "--method", "adacache", "--set", "moreg_window=3"], "moreg_window must be"),
    "no field": ([PROMPT, "--set", "moreg"], "--set takes name=value"),
    "field of no method": ([PROMPT, "--method", "none", "--set", "moreg=true"], "has no effect with --method none"),
    "method as a field": ([PROMPT, "--set", "method=schedule"], "use --method"),
    "compare with itself": ([PROMPT, "--method", "none", "--compare"], "name a --method other than none"),
    "zero steps": ([PROMPT, "--steps", "0"], "--steps"),
    "half a step": ([PROMPT, "--steps", "1.5"], "--steps"),
    "no such option": ([PROMPT, "--stpes", "5"], "--stpes"),
    "size of one number": ([PROMPT, "--size", "48"], "--size must be WIDTHxHEIGHT in pixels, as in 832x480, got '48'"),
    "size of nothing": ([PROMPT, "--size", "0x48"], "got '0x48'"),
    "negative size": ([PROMPT, "--size", "-48x48"], "got '-48x48'"),
    "unknown ending": ([PROMPT, "-o", "out.avi"], "'.avi'; known: .mp4, .gif, .png"),
    "no ending": (
        [PROMPT, "-o", "out"],
        "-o out has no ending; name a file (out.mp4, out.gif, out.png) or a folder (out/)",
    ),
    "unknown format": ([PROMPT, "--format", "webm"], "'.webm'; known: .mp4, .gif, .png"),
    "two formats": ([PROMPT, "--format", "gif", "-o", "a.mp4"], "contradict each other"),
    "one file for two": ([PROMPT, PROMPT, "-o", "a.mp4"], "names one file, but there are 2 prompts"),
    "a file as a folder": ([PROMPT, "-o", "latin.txt/a.mp4"], "latin.txt is not a folder"),
    "somebody's json": ([PROMPT, "-o", "notes.mp4"], "notes.json exists and was not written by unicp"),
    "unknown device": ([PROMPT, "--device", "gpu"], "unknown device 'gpu'; known: "),
    "absent device": ([PROMPT, "--device", "cuda:99"], "--device cuda:99 is not available here"),
    "unknown dtype": ([PROMPT, "--dtype", "fp8"], "unknown dtype 'fp8'; known: float32, bfloat16, float16"),
    "missing folder": ([PROMPT, "--model", "./none"], "there is no model folder ./none; --model takes demo, a folder"),
    "empty folder": ([PROMPT, "--model", "empty"], "empty is no diffusers pipeline: it has no model_index.json"),
    "nameless pipeline": ([PROMPT, "--model", "nameless"], "names no pipeline class"),
    "unknown pipeline": ([PROMPT, "--model", "future"], "class WanPipelineOfTomorrow, which diffusers"),
    "image pipeline": ([PROMPT, "--model", "image"], "StableDiffusionPipeline, which does not make videos from text"),
    "image to video": ([PROMPT, "--model", "from-image"], "needs 'image' too"),
    "no transformer": ([PROMPT, "--model", "unet"], "has no diffusion transformer"),
}

AFTER_LOADING = {
    "no weights": ([PROMPT, "--model", "damaged"], "damaged cannot be loaded: "),
    "width not divisible": ([PROMPT, "--size", "100x32"], "width 100 is not a multiple of 16, as WanPipeline needs"),
    "height not divisible": ([PROMPT, "--size", "96x15"], "height 15 is not a multiple of 16"),
    "width too small": ([PROMPT, "--size", "15x96"], "nearest: 16"),
    "nearest widths": ([PROMPT, "--size", "100x32"], "nearest: 96 or 112"),
    "frames not divisible": ([PROMPT, "--frames", "16"], "--frames 16 is not 1 more than a multiple of 2"),
    "nearest frames": ([PROMPT, "--frames", "16"], "nearest: 15 or 17"),
}


def refusal(run: Run, capsys: Any, arguments: list[str]) -> str:
    """The one or two lines of a refusal; nothing may have been written."""
    folder = Path.cwd()
    prepare(folder)
    before = names(folder)
    assert run(*arguments) == 2
    assert names(folder) == before
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: ")
    assert len(out.err.splitlines()) <= 2
    assert "Traceback" not in out.err
    return out.err


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_bad_input_is_refused_before_weights_are_loaded(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("weights were loaded"))
    arguments, expected = BEFORE_LOADING[case]
    assert expected in refusal(run, capsys, arguments)


@pytest.mark.parametrize("case", AFTER_LOADING)
def test_bad_input_is_refused_before_the_run(run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr("unicp.cli.jobs.make", lambda *_, **__: pytest.fail("a video was made"))
    arguments, expected = AFTER_LOADING[case]
    assert expected in refusal(run, capsys, arguments)


def test_what_looks_like_an_emoji_is_shown_as_it_is(run: Run, capsys: Any) -> None:
    assert run("a ball", "--method", "my:car:.safetensors") == 2
    assert "my:car:.safetensors" in capsys.readouterr().err.replace("\n", "")


def test_an_unknown_denoiser_is_refused_by_methods_that_look_inside(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs.known_specs()
    monkeypatch.delitem(specs._SPECS, "WanTransformer3DModel")
    assert run(PROMPT, "--method", "schedule", "--set", "interval=2", "-o", "out.png") == 0
    capsys.readouterr()
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("weights were loaded"))
    said = refusal(run, capsys, [PROMPT, "--method", "unicp"])
    assert "the structure of WanTransformer3DModel is not known" in said


def test_a_missing_demo_model_says_how_to_get_it(run: Run, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "path", lambda: tmp_path / "nowhere")
    assert "the demo model is missing" in refusal(run, capsys, [PROMPT, "--model", "demo"])


def test_a_hub_that_cannot_be_reached_is_said_at_once(run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    said = refusal(run, capsys, [PROMPT, "--model", "nobody/no-such-model"])
    assert "there is no folder nobody/no-such-model, and the hub cannot be reached" in said
