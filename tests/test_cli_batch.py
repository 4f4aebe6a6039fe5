"""``unicp batch`` on a real pipeline with tiny random weights: on processes, on Ray, in one forward."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.batch_fakes import FakeRecipe, clip, made
from unicp import BudgetConfig, ScheduleConfig, UniCPConfig, UnicpError, cli
from unicp.batch import driver, manifest, ray_engine
from unicp.batch.clips import Clip
from unicp.batch.worker import Worker
from unicp.cli import calls, making
from unicp.cli.batching import Plan
from unicp.cli.clips import absolute, identity
from unicp.cli.making import PipelineMaker, PipelineRecipe
from unicp.cli.model import Model

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = """prompt,seed,negative_prompt,size,method
a red ball,,,,
a blue star,4 5,blue,,
a fast ball,,,32x32,none
a star,,,50x32,
"""
SMALL = ["--size", "48x32", "--frames", "5", "--steps", "6", "--threads", "1", "--device", "cpu", "--format", "png"]
METHOD = ["--method", "adacache", "--set", "codebook=((0.5, 3), (1.0, 2))"]
TOLERANCE = 1e-5
"""Largest difference of a pixel in [0, 1] between a clip made alone and the same in a forward with others, float32."""


def call(*arguments: str) -> SimpleNamespace:
    """Run the command: its exit code and what it said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["batch", *arguments])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Ray's workers find this tree; what other tests rely on is left as it was."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), str(ROOT)]))
        patch.setenv("COLUMNS", "80")
        yield
    torch.set_num_threads(threads)
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.csv"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def local(prompts: Path, wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The batch on two processes."""
    folder = tmp_path_factory.mktemp("local") / "out"
    said = call(str(prompts), "-o", str(folder), "--model", str(wan_folder), *SMALL, *METHOD, "--workers", "2")
    return SimpleNamespace(folder=folder, **vars(said))


@pytest.fixture(scope="module")
def plan(prompts: Path, wan_folder: Path) -> Plan:
    given = {"--size": (48, 32), "--frames": 5, "--steps": 6}
    return Plan.read(
        prompts, model=str(wan_folder), method="adacache", settings=METHOD[3:], given=given, fps=None, kind="png"
    )


@pytest.fixture(scope="module")
def maker(plan: Plan) -> PipelineMaker:
    return PipelineRecipe(model=plan.model, threads=1).load("cpu")


def stills(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# --- what is made ---------------------------------------------------------------------------------------------------


def test_a_batch_on_two_processes(local: SimpleNamespace, wan_folder: Path) -> None:
    assert local.code == 1, local.err
    names = list(stills(local.folder))
    assert [name[:-13] for name in names] == ["a-blue-star-s4", "a-blue-star-s5", "a-fast-ball-s0", "a-red-ball-s0"]
    records = [json.loads((local.folder / name).with_suffix(".json").read_text()) for name in names]
    assert [(record["prompt"], record["seed"]) for record in records][:2] == [("a blue star", 4), ("a blue star", 5)]
    assert records[0]["negative"] == "blue" and records[3]["negative"] is None
    assert (records[2]["video"]["width"], records[2]["method"], records[2]["config"]) == (32, "none", None)
    assert records[3]["config"]["codebook"] == [[0.5, 3], [1.0, 2]]
    assert records[3]["report"]["computed_fraction"] < 1
    assert records[3]["model"]["name"] == str(wan_folder)
    assert "4 clips made" in local.out and "1 failed; run it again to try them again:" in local.out
    assert "width 50 is not a multiple of 16" in local.out and "a-star-s0-" in local.out
    sheet = (local.folder / "summary.html").read_text()
    assert sheet.count("data:image/jpeg;base64,") == 4 and "width 50 is not" in sheet
    assert "\x1b" not in local.out + local.err


def test_status(local: SimpleNamespace) -> None:
    said = call("status", str(local.folder))
    assert said.code == 0
    assert "4 done, 1 failed" in said.out and "width 50 is not a multiple" in said.out
    assert "of the denoiser's operations computed" in said.out
    assert "no batch is running here; run the same command again" in said.out
    assert "there is no batch in" in call("status", str(local.folder.parent)).err


def test_a_status_while_it_runs(local: SimpleNamespace) -> None:
    from unicp.batch.lock import Lock

    base = manifest.Manifest(local.folder)
    failed = next(entry for entry in base.entries() if entry.state == "failed")
    with Lock(local.folder / manifest.PRIVATE_FOLDER):
        base.start([failed.key], 1)
        said = call("status", str(local.folder)).out
        base.finish([driver.Outcome(key=failed.key, error="width 50 is not a multiple")])
    base.close()
    assert f"running: process {os.getpid()} on " in said
    assert f"worker 1: {failed.name}, " in said and "4 done" not in said.splitlines()[1] and "1 running" in said


def test_one_worker_and_two_make_the_same_bits(
    local: SimpleNamespace, plan: Plan, maker: PipelineMaker, tmp_path: Path
) -> None:
    clips = plan.clips(seed=0, seeds=1, names="hash", dtype=None, scale=None)
    recipe = SimpleNamespace(load=lambda device: maker)
    manifest.prepare(tmp_path)
    outcomes = [Worker(recipe, tmp_path, tmp_path / manifest.PRIVATE_FOLDER).make([each])[0] for each in clips]
    assert [outcome.error is None for outcome in outcomes] == [True] * 4 + [False]
    assert stills(tmp_path) == stills(local.folder)


@pytest.mark.slow
def test_ray_makes_the_same_bits(local: SimpleNamespace, plan: Plan, tmp_path: Path) -> None:
    said = call(
        *(str(plan.file), "-o", str(tmp_path), "--model", plan.model.name, *SMALL, *METHOD),
        *("--engine", "ray", "--workers", "1"),
    )
    assert said.code == 1, said.err
    assert "4 clips made" in said.out
    assert stills(tmp_path) == stills(local.folder)


@pytest.mark.slow
def test_sixty_prompts_are_the_same_on_processes_and_on_ray(wan_folder: Path, tmp_path: Path) -> None:
    words = ("a", "fast"), ("red", "blue"), ("ball", "star", "bouncing"), ("fast", "red", "blue", "ball", "star")
    (tmp_path / "p.txt").write_text("\n".join(" ".join(each) for each in itertools.product(*words)))
    common = [str(tmp_path / "p.txt"), "--model", str(wan_folder), *SMALL, *METHOD, "--workers", "2"]
    for engine in ("local", "ray"):
        said = call(*common, "-o", str(tmp_path / engine), "--engine", engine)
        assert said.code == 0, said.err
    assert len(stills(tmp_path / "local")) == 60
    assert stills(tmp_path / "local") == stills(tmp_path / "ray")
    assert len(set(stills(tmp_path / "local").values())) == 60


@pytest.mark.slow
def test_a_dead_ray_worker_is_replaced(tmp_path: Path) -> None:
    ray = ray_engine.connect(None)
    recipe = FakeRecipe(str(tmp_path / "log"))
    clips = [clip("kill"), clip("a"), clip("once"), clip("fail"), clip("b")]

    def engine(setting: Any) -> ray_engine.RayEngine:
        return ray_engine.RayEngine(setting, ray, cpus=0.5)

    result = driver.run(clips, tmp_path / "out", recipe, engine, workers=2, retries=1)
    assert result.made == 3
    assert result.failed["fail-0.png"] == "ValueError: bad <b> prompt"
    assert result.failed["kill-0.png"].startswith("the worker that made it died, 2 times: ")
    again = driver.run(clips[1:3], tmp_path / "out", recipe, engine, workers=2)
    assert (again.found, again.made) == (2, 0)
    with pytest.raises(UnicpError, match=r"no worker is left.*no such weights"):
        driver.run([clip("c")], tmp_path / "out", FakeRecipe("", unloadable=True), engine)
    assert len(made(recipe.log)) == 7  # two each of those that killed, one of the others
    with pytest.raises(UnicpError, match="--gpus-per-worker 64: the Ray cluster has"):
        ray_engine.worker_count(ray, 64)
    assert ray_engine.worker_count(ray, 0) == 1


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnicpError, match=r"pip install 'unicp\[ray\]'"):
        ray_engine.connect(None)


# --- one forward ----------------------------------------------------------------------------------------------------


def clips_of(plan: Plan, method: dict[str, Any] | None, count: int = 3) -> list[Clip]:
    call, fps = calls.build(plan.model, plan.given, None)
    texts = ["a red ball", "a blue star bouncing fast", "a fast red star"]
    values = {"call": call, "fps": fps, "image": None, "method": "m", "config": method}
    return [
        Clip(key=f"{seed}", name=f"{seed}.png", prompt=texts[seed % 3], seed=seed, values=values, group="g")
        for seed in range(count)
    ]


@pytest.mark.parametrize("config", [None, ScheduleConfig(interval=2).to_dict()])
def test_a_clip_is_the_same_in_any_batch(plan: Plan, maker: PipelineMaker, config: dict[str, Any] | None) -> None:
    clips = clips_of(plan, config)
    alone = [maker.make([each])[0].frames for each in clips]
    for chosen in ([0, 1, 2], [2, 0]):
        together = maker.make([clips[index] for index in chosen])
        for index, rendered in zip(chosen, together, strict=True):
            assert np.abs(rendered.frames - alone[index]).max() <= TOLERANCE
            assert rendered.record["seed"] == index and rendered.record["prompt"] == clips[index].prompt
    assert together[1].record["clip"]["batch"] == [
        {"prompt": "a fast red star", "seed": 2},
        {"prompt": "a red ball", "seed": 0},
    ]
    assert np.abs(alone[0] - alone[1]).max() > 100 * TOLERANCE


@pytest.mark.filterwarnings("ignore:adacache never acted")
def test_a_batch_follows_its_most_demanding_clip(plan: Plan, maker: PipelineMaker) -> None:
    """The change measured in a forward with others is the largest of them: never below that of a clip alone."""
    config = {"method": "adacache", "codebook": ((1.0, 1),)}
    clips = clips_of(plan, config)

    def metrics(rendered: Any) -> list[float | None]:
        return [step["metric"] for step in rendered.record["report"]["steps"] if step["metric"] is not None]

    alone = [metrics(maker.make([each])[0]) for each in clips]
    together = metrics(maker.make(clips)[0])
    worst = [max(values) for values in zip(*alone, strict=True)]
    assert len(worst) == 5 and together == pytest.approx(worst, rel=1e-3)
    assert len({tuple(each) for each in alone}) == 3


def test_negative_prompts_stay_with_their_clips(plan: Plan, maker: PipelineMaker) -> None:
    clips = []
    for each, negative in zip(clips_of(plan, None, 2), ("blue", "fast star"), strict=True):
        values = {**each.values, "call": {**each.values["call"], "negative_prompt": negative}}
        clips.append(Clip(key=each.key, name=each.name, prompt=each.prompt, seed=each.seed, values=values))
    alone = [maker.make([each])[0] for each in clips]
    together = maker.make(clips)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.frames - other.frames).max() <= TOLERANCE
        assert one.record["negative"] == other.record["negative"]
    assert together[1].record["negative"] == "fast star"


def test_a_worker_accelerates_once_for_each_config(
    plan: Plan, maker: PipelineMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on: list[Any] = []
    real = making.accelerate
    monkeypatch.setattr(making, "accelerate", lambda pipe, config: put_on.append(config) or real(pipe, config))
    never, half = {"method": "adacache", "codebook": ((1.0, 1),)}, ScheduleConfig(interval=2).to_dict()
    manifest.prepare(tmp_path)
    worker = Worker(SimpleNamespace(load=lambda device: maker), tmp_path, tmp_path / manifest.PRIVATE_FOLDER)

    def batch(config: dict[str, Any] | None, count: int = 3) -> list[Any]:
        outcomes = [worker.make([each])[0] for each in clips_of(plan, config, count)]
        assert not any(outcome.error for outcome in outcomes)
        records = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(count)]
        return [(outcome.warnings, record["report"], pixels) for outcome, record, pixels in zip(
            outcomes, records, stills(tmp_path).values(), strict=False)]  # fmt: skip

    alone = batch(never)
    assert [config.method for config in put_on] == ["adacache"]
    assert all("never acted" in said[0] for said, _, _ in alone)  # each clip's record says it
    assert all(report["computed_steps"] == 6 for _, report, _ in alone)
    skipped = batch(half)
    assert [config.method for config in put_on] == ["adacache", "schedule"]
    assert all(not said and report["computed_steps"] < 6 for said, report, _ in skipped)
    bare = batch(None)
    assert [report for _, report, _ in bare] == [None] * 3 and len(put_on) == 2
    assert [pixels for _, _, pixels in bare] == [pixels for _, _, pixels in alone]
    # What a video keeps that broke off is not kept until the next one.
    (broken,) = clips_of(plan, half, 1)
    batch(half, 1)
    monkeypatch.setattr(maker._pipe.scheduler, "step", lambda *args, **more: 1 / 0)
    (outcome,) = worker.make([broken])
    assert "division by zero" in outcome.error and maker._session is None
    assert not hasattr(maker._pipe.transformer, "_diffusers_hook")
    monkeypatch.undo()
    assert [pixels for _, _, pixels in batch(half)] == [pixels for _, _, pixels in skipped]


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_seeds_names_and_repeated_rows(wan_folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed\na ball,\na star,7\na ball,\na ball,9\n")
    plan = Plan.read(
        tmp_path / "p.csv", model=str(wan_folder), method="none", settings=[], given={}, fps=None, kind="mp4"
    )
    options: dict[str, Any] = {"seed": 0, "seeds": 2, "dtype": None, "scale": None}
    clips = plan.clips(names="vbench", **options)
    assert [(each.name, each.seed) for each in clips] == [
        ("a ball-0.mp4", 0),
        ("a ball-1.mp4", 1),
        ("a star-0.mp4", 7),
        ("a star-1.mp4", 8),
        ("a ball-2.mp4", 9),
        ("a ball-3.mp4", 10),
    ]
    assert "2 of the clips are asked for more than once" in capsys.readouterr().err
    hashed = plan.clips(names="hash", **options)
    assert [each.key for each in hashed] == [each.key for each in clips]
    assert len({each.name for each in hashed}) == 6
    other = plan.clips(names="hash", **{**options, "dtype": "bfloat16"})
    assert {each.key for each in other}.isdisjoint(each.key for each in hashed)
    assert all(each.expected_bytes > 10**6 for each in clips)  # the pipeline's own size is large


def test_a_model_of_the_hub_is_the_same_tomorrow_and_without_network() -> None:
    today = Model(name="someone/model", source="someone/model", index={}, revision="a")
    assert identity(today) == identity(replace(today, revision=None, offline=True)) == "someone/model"


def test_profiles_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inner = BudgetConfig(profile="b.safetensors")
    found: Any = absolute(UniCPConfig(profile="a.safetensors", stack=inner))
    assert found.profile == str(tmp_path / "a.safetensors") and found.stack.profile == str(tmp_path / "b.safetensors")
    assert absolute(ScheduleConfig(interval=2)) == ScheduleConfig(interval=2)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ("prompt,method\na,adacash\n", [], "row 2: unknown method 'adacash'"),
        ("prompt\na/b\n", ["--names", "vbench"], "row 2: no file can be named after the prompt 'a/b'"),
        ("prompt,image\na,p.csv\n", [], "row 2: WanPipeline does not take 'image'"),
        ("prompt,seed\na,4294967295\n", ["--seeds", "2"], "row 2: seed 4294967295 and 1 more go beyond"),
        ("prompt\na\n", ["--engine", "spark"], "unknown engine 'spark'; known: local, ray"),
        ("prompt\na\n", ["--address", "auto"], "--address is for --engine ray"),
        ("prompt\na\n", ["--cpus-per-worker", "1"], "--cpus-per-worker is for --engine ray"),
        ("prompt\na\n", ["--size", "48"], "--size must be WIDTHxHEIGHT"),
        ("prompt\na\n", ["--format", "avi"], "known: .mp4, .gif, .png"),
    ],
)
def test_refusals(wan_folder: Path, tmp_path: Path, rows: str, options: list[str], said: str) -> None:
    (tmp_path / "p.csv").write_text(rows)
    result = call(str(tmp_path / "p.csv"), "-o", str(tmp_path / "out"), "--model", str(wan_folder), *options)
    assert result.code == 2
    assert said in result.err
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_words_themselves(tmp_path: Path) -> None:
    assert "name the folder of the clips" in call("p.txt").err
    assert "takes one file of prompts, got 2: a b" in call("a", "b", "-o", "c").err
    assert "name one folder" in call("status").err


def test_a_pipeline_that_starts_from_an_image_gets_it(tmp_path: Path) -> None:
    model = Model(name="m", source="m", index={"_class_name": "WanImageToVideoPipeline"})
    with pytest.raises(UnicpError, match="needs 'image' too"):
        calls.build(model, {}, None)
    call, fps = calls.build(model, {"--frames": 2}, None, ("prompt", "image"))
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    given: dict[str, Any] = {}

    class Pipe:
        scheduler = None

        def __call__(self, image: Any, prompt: str, generator: Any, output_type: str, num_frames: int) -> Any:
            given.update(image=image, prompt=prompt)
            frames = np.zeros((1, num_frames, 8, 8, 3), np.float32)
            frames[0, 1] = np.nan if prompt == "broken" else 0.5
            return SimpleNamespace(frames=frames)

    maker = PipelineMaker(PipelineRecipe(model=model), Pipe(), torch.device("cpu"), torch.float32)
    values = {"call": call, "fps": fps, "image": str(tmp_path / "red.png"), "method": "none", "config": None}
    (made,) = maker.make([Clip(key="k", name="a.png", prompt="a", seed=0, values=values)])
    assert given["image"].getpixel((0, 0)) == (255, 0, 0)
    assert made.record["call"]["image"] == str(tmp_path / "red.png")
    assert json.loads(maker.document(made.record))["video"]["frames"] == 2
    (broken,) = maker.make([Clip(key="k", name="a.png", prompt="broken", seed=0, values=values)])
    assert "not numbers" in str(broken)
