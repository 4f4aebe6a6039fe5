"""``unicp generate`` on a real pipeline with tiny random weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from unicp import Profile, ScheduleConfig, accelerate, cli, demo, metrics, specs, video
from unicp.cli import outputs, pipelines, running, screen
from unicp.policies import config_from_dict

PROMPT = "a red ball bouncing"
SMALL = ["--size", "48x32", "--frames", "5", "--steps", "8"]
EAGER = ["--method", "schedule", "--set", "interval=2"]
"""A method that surely skips steps, whatever the weights."""

Run = Callable[..., int]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Wan pipeline that is as small as can be, and knows a few words."""
    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *"a red blue ball star bouncing fast".split()]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sizes = {"vocab_size": len(words), "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes, dropout_rate=0.0, pad_token_id=0, eos_token_id=1)),
        transformer=WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls ``unicp generate`` with the tiny model, in an empty current folder. Returns the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str, model: str | None = None) -> int:
        return cli.main(["generate", "--model", model or str(tiny), *SMALL, *arguments])

    return call


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The float frames of every video that was made."""
    made: list[Any] = []
    make = running.make

    def spy(*args: Any, **kwargs: Any) -> Any:
        made.append(make(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("unicp.cli.jobs.make", spy)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- what is made ---------------------------------------------------------------------------------------------------


def test_a_video_and_its_record(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROMPT, *EAGER, "-o", "out.mp4") == 0
    assert names(tmp_path) == ["out.json", "out.mp4"]
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["prompt"] == PROMPT
    assert record["seed"] == 0
    assert record["config"] == json.loads(ScheduleConfig(interval=2).to_json())
    assert record["model"]["pipeline"] == "WanPipeline"
    assert record["video"] == {"file": "out.mp4", "frames": 5, "width": 48, "height": 32, "fps": 16.0, "scale": 9}
    assert {"unicp", "torch", "diffusers", "transformers", "python"} <= record["versions"].keys()
    assert [step["action"] for step in record["report"]["steps"]].count("reuse") == 6
    assert record["timings"]["total_seconds"] >= record["timings"]["loop_seconds"] > 0
    out = capsys.readouterr()
    assert "5 of 8 denoising steps computed" in out.out
    assert "\x1b" not in out.out + out.err  # no terminal, no control codes
    assert out.err == ""


@pytest.mark.parametrize("method", [["--method", "none"], EAGER, ["--set", "codebook=((0.5, 3), (1.0, 2))"]])
def test_the_record_is_enough_to_make_the_video_again(
    run: Run, tmp_path: Path, shown: list[Any], method: list[str]
) -> None:
    assert run(PROMPT, *method, "--seed", "7", "--guidance", "3", "--negative", "blue star", "-o", "out.png") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    pipe = WanPipeline.from_pretrained(record["model"]["name"], torch_dtype=getattr(torch, record["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    if record["config"] is not None:
        accelerate(pipe, config_from_dict(record["config"]))
    generator = torch.Generator().manual_seed(record["seed"])
    again = pipe(**record["call"], generator=generator, output_type="np").frames[0]
    assert (again == shown[0].frames).all()


def test_the_accelerated_video_is_another_one(run: Run, shown: list[Any]) -> None:
    assert run(PROMPT, "--method", "none", "-o", "a.png") == 0
    assert run(PROMPT, *EAGER, "-o", "b.png") == 0
    assert run(PROMPT, "--set", "codebook=[[1.0, 1]]", "-o", "c.png") == 0
    assert not (shown[0].frames == shown[1].frames).all()
    assert (shown[0].frames == shown[2].frames).all()  # computes every step


def test_compare(run: Run, tmp_path: Path, shown: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROMPT, *EAGER, "--compare", "-o", "out.gif") == 0
    expected = ["out-baseline.gif", "out-baseline.json", "out-compare.gif", "out.gif", "out.json"]
    assert names(tmp_path) == expected
    warm_up, baseline, made = shown
    assert warm_up.steps == 2
    assert baseline.report is None and made.report.computed_steps == 5
    comparison = json.loads((tmp_path / "out.json").read_text())["comparison"]
    assert comparison["psnr_db"] == pytest.approx(metrics.psnr(made.frames, baseline.frames))
    assert comparison["ssim"] == pytest.approx(metrics.ssim(made.frames, baseline.frames))
    assert comparison["loop_speedup"] == pytest.approx(baseline.loop_seconds / made.loop_seconds)
    assert json.loads((tmp_path / "out-baseline.json").read_text())["config"] is None
    out = capsys.readouterr().out
    for word in ("denoising loop", "x as fast", "62%", "PSNR", "SSIM", "motion ratio", "One run each", *expected):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80


def test_an_equal_video_is_called_identical(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROMPT, "--set", "codebook=[[1.0, 1]]", "--compare", "-o", "out.png") == 0
    out = capsys.readouterr()
    assert "identical" in out.out
    assert out.err.startswith("warning: unicp adacache never acted")
    text = (tmp_path / "out.json").read_text()
    assert float(json.loads(text)["comparison"]["psnr_db"]) == float("inf")
    assert "Infinity" not in text


def test_several_prompts_and_a_file_of_them(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.txt").write_text("a blue star\n\n  a RED ball, bouncing \n")
    arguments = ["a blue star", "--prompts-file", "more.txt", "--format", "png", "--set", "moreg=true"]
    assert run(*arguments, "-o", "videos") == 0
    stems = ["a-blue-star", "a-blue-star-2", "a-red-ball-bouncing"]
    assert names(tmp_path / "videos") == sorted(f"{stem}.{kind}" for stem in stems for kind in ("json", "png"))
    assert "3/3 a RED ball, bouncing" in capsys.readouterr().out
    records = [json.loads((tmp_path / "videos" / f"{stem}.json").read_text()) for stem in stems]
    assert [record["prompt"] for record in records] == ["a blue star", "a blue star", "a RED ball, bouncing"]
    assert {record["seed"] for record in records} == {0}
    assert records[0]["config"]["moreg"] is True


def test_made_up_names_replace_nothing_and_given_ones_do(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert run(PROMPT, *EAGER, "--format", "png") == 0
    assert names(tmp_path) == [f"a-red-ball-bouncing{end}" for end in ("-2.json", "-2.png", ".json", ".png")]
    (tmp_path / "given.png").write_bytes(b"old")
    assert run(PROMPT, *EAGER, "-o", "given.png") == 0
    assert (tmp_path / "given.png").stat().st_size > 3


def test_a_profile_is_a_method(run: Run, tmp_path: Path) -> None:
    Profile(config=ScheduleConfig(interval=4), tensors={"x": torch.zeros(1)}).save(tmp_path / "p.safetensors")
    assert run(PROMPT, "--method", "p.safetensors", "--set", "warmup_steps=1", "-o", "out.png") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["method"] == "p.safetensors"
    assert (record["config"]["interval"], record["config"]["warmup_steps"]) == (4, 1)
    assert record["report"]["computed_steps"] == 2


def test_the_demo_model_has_its_own_defaults_and_few_words(
    run: Run, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "path", lambda: tiny)
    assert cli.main(["generate", "a red Zebra, bouncing", *EAGER, "--steps", "3", "-o", "out.mp4"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["call"]["num_inference_steps"] == 3
    assert (record["call"]["width"], record["call"]["num_frames"]) == (demo.WIDTH, demo.FRAMES)
    assert (record["call"]["guidance_scale"], record["video"]["fps"]) == (demo.GUIDANCE, demo.FPS)
    assert record["model"]["name"] == "demo"
    assert "does not know 'Zebra', ','; it draws captions such as" in capsys.readouterr().err


def test_progress_says_what_each_step_did(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(screen.Steps, "show", lambda self, *said: seen.append(said))
    assert run(PROMPT, *EAGER, "-o", "out.png") == 0
    assert [(done, total) for done, total, *_ in seen] == [(step, 8) for step in range(1, 9)]
    what = ["computed"] * 3 + ["reused", "computed", "reused", "computed", "decoding"]
    assert [said[3] for said in seen] == what
    sigmas = [said[2] for said in seen]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[0] == pytest.approx(1, abs=0.01)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(screen, "HEARTBEAT", 0)
    assert run(PROMPT, *EAGER, "-o", "out.png") == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[3].startswith("schedule: step 4/8  σ 0.") and lines[3].endswith("reused")


# --- whole or not at all --------------------------------------------------------------------------------------------


def test_ctrl_c_in_a_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(screen.Steps, "show", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(PROMPT, "-o", "new/out.mp4") == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "error: interrupted; no half file left\n"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (OSError(28, "No space left on device"), 1)])
def test_a_stop_while_writing_keeps_what_was_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Any, code: int
) -> None:
    assert run(PROMPT, *EAGER, "-o", "out.mp4") == 0
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    write = video.WRITERS[".mp4"]
    calls: list[Path] = []

    def fails_at_the_third(frames: Any, target: Path, fps: float) -> None:
        calls.append(target)
        write(frames, target, fps)
        if len(calls) == 3:
            raise error

    monkeypatch.setitem(video.WRITERS, ".mp4", fails_at_the_third)
    assert run(PROMPT, *EAGER, "--compare", "--seed", "1", "-o", "out.mp4") == code
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert code == 130 or "No space left" in err


def test_videos_that_are_complete_stay(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([False, True])
    make = running.make
    stop = lambda *args, **kwargs: signal.raise_signal(signal.SIGINT) if next(made) else make(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("unicp.cli.jobs.make", stop)
    assert run("a red ball", "a blue star", *EAGER, "--format", "png") == 130
    assert names(tmp_path) == ["a-red-ball.json", "a-red-ball.png"]


def test_a_video_that_is_not_numbers_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    decode = AutoencoderKLWan.decode

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(value * float("nan") for value in decode(self, *args, **kwargs))

    monkeypatch.setattr(AutoencoderKLWan, "decode", broken)
    assert run(PROMPT, "-o", "out.mp4") == 1
    assert "try --dtype float32" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_debug_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("unicp.cli.jobs.make", lambda *_, **__: 1 / 0)
    assert run(PROMPT, "-o", "out.mp4") == 1
    brief = capsys.readouterr().err
    assert brief == "error: ZeroDivisionError: division by zero\n       run it again with --debug for the traceback\n"
    assert run(PROMPT, "-o", "out.mp4", "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------------------------


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
    "unknown method": ([PROMPT, "--method", "adacash"], "unknown method 'adacash'; known: none, adacache, schedule"),
    "near method": ([PROMPT, "--method", "adacash"], "Did you mean 'adacache'?"),
    "missing profile": ([PROMPT, "--method", "p.safetensors"], "there is no profile p.safetensors"),
    "broken profile": ([PROMPT, "--method", "broken.safetensors"], "broken.safetensors is not a readable profile"),
    "no profile": ([PROMPT, "--method", "weights.safetensors"], "is a safetensors file, but no unicp profile"),
    "bare schedule": ([PROMPT, "--method", "schedule"], "give exactly one of compute=(0, 1, 5, ...) and interval=2"),
    "negative threshold": (
        [PROMPT, "--set", "codebook=[[-0.1, 3], [1, 1]]"],
        "must be a number of at least 0, got -0.1",
    ),
    "unsorted codebook": ([PROMPT, "--set", "codebook=((0.5, 3), (0.1, 1))"], "thresholds of the codebook must rise"),
    "unknown codebook": ([PROMPT, "--set", "codebook=demo-51"], "Did you mean 'demo-50'?"),
    "unknown field": ([PROMPT, "--set", "more=1"], "unknown field of AdaCacheConfig 'more'"),
    "unfit field": ([PROMPT, "--set", "moreg_window=3"], "--set moreg_window=3: "),
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


def test_an_unknown_denoiser_is_refused_by_methods_that_look_inside(
    run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs.known_specs()
    monkeypatch.delitem(specs._SPECS, "WanTransformer3DModel")
    assert run(PROMPT, *EAGER, "-o", "out.png") == 0
    capsys.readouterr()
    monkeypatch.setattr(pipelines, "load", lambda *_: pytest.fail("weights were loaded"))
    assert "the structure of WanTransformer3DModel is not known" in refusal(run, capsys, [PROMPT])


def test_a_missing_demo_model_says_how_to_get_it(run: Run, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "path", lambda: tmp_path / "nowhere")
    assert "the demo model is missing" in refusal(run, capsys, [PROMPT, "--model", "demo"])


def test_a_hub_that_cannot_be_reached_is_said_at_once(run: Run, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    said = refusal(run, capsys, [PROMPT, "--model", "nobody/no-such-model"])
    assert "there is no folder nobody/no-such-model, and the hub cannot be reached" in said


# --- names and help -------------------------------------------------------------------------------------------------


def test_a_name_is_cut_at_a_word_and_never_empty() -> None:
    assert outputs.slug("Über die Brücke!") == "über-die-brücke"
    assert outputs.slug("?!") == "video"
    assert outputs.slug("../../etc/passwd") == "etc-passwd"
    long = outputs.slug("word " * 40)
    assert len(long) <= outputs.LONGEST and long.endswith("word")
    assert len(outputs.slug("w" * 300)) == outputs.LONGEST


def test_models_lists_every_family_and_method(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    for word in (*specs.known_specs(), "adacache", "schedule"):
        assert word in out


PROBE = """
import sys
from unicp.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--version"], 0, "unicp 0."),
        ([], 0, "generate"),
        (["generate", "--help"], 0, "schedule"),
        (["generate", "x", "--method", "nope"], 2, "unknown method"),
    ],
)
def test_help_and_early_errors_load_nothing_heavy(arguments: list[str], code: int, word: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert word in done.stdout + done.stderr


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "unicp", "generate"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: nothing to generate")


def test_frames_are_counted_in_the_file(run: Run, tmp_path: Path) -> None:
    from imageio_ffmpeg import count_frames_and_secs

    assert run(PROMPT, *EAGER, "--fps", "5", "--scale", "2", "-o", "out.mp4") == 0
    frames, seconds = count_frames_and_secs(str(tmp_path / "out.mp4"))
    assert frames == 5
    assert np.isclose(seconds, 1.0)
