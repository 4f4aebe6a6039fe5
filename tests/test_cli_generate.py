"""``unicp generate`` on a real pipeline with tiny random weights."""

from __future__ import annotations

import importlib
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
from diffusers import AutoencoderKLWan, WanPipeline
from PIL import Image

from unicp import Profile, ScheduleConfig, accelerate, cli, demo, specs
from unicp.batch.names import MAX_SLUG_LENGTH, slug
from unicp.cli import calls, pipelines, running, screen
from unicp.cli.model import Model
from unicp.files import video
from unicp.policies import config_from_dict
from unicp.specs.unsupported import UNSUPPORTED
from unicp.tensors import metrics

PROMPT = "a red ball bouncing"
EAGER = ["--method", "schedule", "--set", "interval=2"]
"""A method that surely skips steps, whatever the weights."""

Run = Callable[..., int]


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


@pytest.mark.parametrize(
    "method", [["--method", "none"], EAGER, ["--method", "adacache", "--set", "codebook=((0.5, 3), (1.0, 2))"]]
)
def test_the_record_is_enough_to_make_the_video_again(
    run: Run, tmp_path: Path, shown: list[Any], method: list[str]
) -> None:
    assert run(PROMPT, *method, "--seed", "7", "--guidance", "3", "--negative", "blue star", "-o", "out.png") == 0
    record = json.loads((tmp_path / "out.json").read_text())
    pipe = WanPipeline.from_pretrained(record["model"]["name"], dtype=getattr(torch, record["dtype"]))
    pipe.set_progress_bar_config(disable=True)
    if record["config"] is not None:
        accelerate(pipe, config_from_dict(record["config"]))
    generator = torch.Generator().manual_seed(record["seed"])
    again = pipe(**record["call"], generator=generator, output_type="np").frames[0]
    assert (again == shown[0].frames).all()


def test_the_accelerated_video_is_another_one(run: Run, shown: list[Any]) -> None:
    assert run(PROMPT, "--method", "none", "-o", "a.png") == 0
    assert run(PROMPT, *EAGER, "-o", "b.png") == 0
    assert run(PROMPT, "--method", "adacache", "--set", "codebook=[[1.0, 1]]", "-o", "c.png") == 0
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
    assert run(PROMPT, "--method", "adacache", "--set", "codebook=[[1.0, 1]]", "--compare", "-o", "out.png") == 0
    out = capsys.readouterr()
    assert "identical" in out.out
    assert out.err.startswith("warning: adacache never acted")
    text = (tmp_path / "out.json").read_text()
    assert float(json.loads(text)["comparison"]["psnr_db"]) == float("inf")
    assert "Infinity" not in text


def test_several_prompts_and_a_file_of_them(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "more.txt").write_text("a blue star\n\n  a RED ball, bouncing \n")
    arguments = [
        "a blue star",
        "--prompts-file",
        "more.txt",
        "--format",
        "png",
        "--method",
        "adacache",
        "--set",
        "moreg=true",
    ]
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
    run: Run, tmp_path: Path, wan_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "path", lambda: wan_folder)
    assert cli.main(["generate", "a red Zebra, bouncing", *EAGER, "--steps", "3", "-o", "out.mp4"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["call"]["num_inference_steps"] == 3
    assert (record["call"]["width"], record["call"]["num_frames"]) == (demo.WIDTH, demo.FRAMES)
    assert (record["call"]["guidance_scale"], record["video"]["fps"]) == (demo.GUIDANCE, demo.FPS)
    assert record["model"]["name"] == "demo"
    assert "does not know 'Zebra', ','; it draws captions such as" in capsys.readouterr().err


def test_the_decoder_of_wan_stays_precise(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    load = pipelines.load
    monkeypatch.setattr(pipelines, "load", lambda *args: loaded.append(load(*args)) or loaded[0])
    assert run(PROMPT, *EAGER, "--dtype", "bfloat16", "-o", "out.png") == 0
    assert loaded[0].transformer.dtype == torch.bfloat16
    assert loaded[0].vae.dtype == torch.float32
    assert json.loads((tmp_path / "out.json").read_text())["dtype"] == "bfloat16"


def test_a_pipeline_that_does_not_say_its_steps_is_timed_too(wan_folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(wan_folder)
    pipe.set_progress_bar_config(disable=True)

    class Silent:
        transformer, scheduler = pipe.transformer, pipe.scheduler

        def __call__(self, prompt: str, output_type: str, generator: Any) -> Any:
            sizes = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
            return pipe(prompt, output_type=output_type, generator=generator, **sizes)

    made = running.make(Silent(), {"prompt": PROMPT}, seed=0, config=None, title="")
    assert made.steps == 4
    assert 0 < made.loop_seconds < made.total_seconds
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


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


@pytest.mark.parametrize("verb", ["tune", "calibrate"])
def test_ctrl_c_in_a_measurement_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, verb: str
) -> None:
    def interrupted(*_: Any, checkpoint: Path, **__: Any) -> None:
        checkpoint.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"unicp.offline.{verb}"), verb, interrupted)
    assert cli.main([verb, "a ball", "-o", str(tmp_path / "made.safetensors")]) == 130
    (kept,) = tmp_path.iterdir()
    said = f"what was measured is saved in {kept}; the same command resumes from there"
    assert said in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("pipeline", "length", "rate"),
    [("LTXPipeline", "num_frames", 25), ("LattePipeline", "video_length", 16), ("CogVideoXPipeline", "num_frames", 16)],
)
def test_other_pipelines_get_only_what_was_asked_for(pipeline: str, length: str, rate: float) -> None:
    model = Model(name="m", source="m", index={"_class_name": pipeline})
    assert calls.build(model, {"--steps": None, "--frames": None}, None) == ({}, rate)
    call, fps = calls.build(model, {"--frames": 9, "--size": (64, 32), "--negative": "blue"}, 12)
    asked = {length: 9, "width": 64, "height": 32, "negative_prompt": "blue"}
    assert call == (asked | {"frame_rate": 12} if pipeline == "LTXPipeline" else asked)
    assert fps == 12


# --- names and help -------------------------------------------------------------------------------------------------


def test_a_name_is_cut_at_a_word_and_never_empty() -> None:
    assert slug("Über die Brücke!") == "über-die-brücke"
    assert slug("?!") == "video"
    assert slug("../../etc/passwd") == "etc-passwd"
    long = slug("word " * 40)
    assert len(long) <= MAX_SLUG_LENGTH and long.endswith("word")
    assert len(slug("w" * 300)) == MAX_SLUG_LENGTH


def test_models_lists_every_family_and_method(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    for word in (*specs.known_specs(), *UNSUPPORTED, "adacache", "schedule"):
        assert word in out
    assert "not tested" not in out


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


# Not the sequential kind: it fails within accelerate where all is a CPU.
@pytest.mark.parametrize("offload", ["model", pytest.param("group", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_that_are_offloaded_or_compiled_make_the_same_video(
    run: Run, tmp_path: Path, offload: str | None, compiled: bool
) -> None:
    assert run(PROMPT, "-o", "plain.png") == 0
    more = [*(["--offload", offload] if offload else []), *["--compile"] * compiled]
    assert run(PROMPT, *more, "--compare", "-o", "out.png") == 0
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("plain", "out")]
    assert (records[1]["offload"], records[1]["compiled"]) == (offload, compiled)
    plain, made = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=float) for name in ("plain", "out"))
    assert np.abs(plain - made).max() <= compiled  # compiled code rounds differently
    assert records[0]["method"] == records[1]["method"] == "budget"
    assert records[1]["report"]["computed_fraction"] == 0.5


def test_an_unknown_way_to_offload_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(PROMPT, "--offload", "disk") == 2
    assert "unknown --offload 'disk'; known: model, group, sequential" in capsys.readouterr().err


def test_the_demo_says_what_to_try_next(
    run: Run, wan_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "path", lambda: wan_folder)
    assert cli.main(["generate", "a red ball", "--steps", "4", "--compare", "-o", "out.png"]) == 0
    said = capsys.readouterr().out
    assert said.index("wrote out.png") < said.index("Next: --set target_speedup=3 is faster")
    assert max(map(len, said.splitlines())) <= 80
