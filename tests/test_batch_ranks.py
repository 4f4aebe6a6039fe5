"""``unicp batch --devices-per-clip``: workers of several processes, first without a model, then a tiny Wan on two.

Ranks that compute import torch and diffusers, so each of those tests takes some ten seconds.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from tests.batch_fakes import ENVIRONMENT, FakeRecipe, clip, made, stills
from tests.test_cli_batch import call
from unicp.batch import driver, manifest, ranks
from unicp.batch.clips import Clip
from unicp.batch.local import LocalEngine
from unicp.batch.ranks import Ranks
from unicp.batch.worker import Worker
from unicp.cli.batching import Plan
from unicp.cli.making import PipelineRecipe

TWO = partial(LocalEngine, ranks=2)
SMALL = ["--size", "48x32", "--frames", "5", "--steps", "8", "--threads", "1", "--device", "cpu", "--format", "png"]
METHOD = ["--method", "adacache", "--set", "codebook=((0.5, 3), (1.0, 2))"]
PROMPTS = """prompt,seed,size,method
a red ball,,,
a star,,50x32,
a blue star,4 5,,
a ball,,16x16,
a fast ball,,,none
"""
TOLERANCE = 1
"""Largest difference of a pixel, of 255, between a clip made on one device and on two, in float32."""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Workers find this tree, those of Ray too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        patch.setenv("COLUMNS", "80")
        yield


def pids(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines()]


# --- processes ------------------------------------------------------------------------------------------------------


def test_all_ranks_make_every_clip_and_one_writes_it(tmp_path: Path) -> None:
    """A prompt that fails on all of them stops no other, and costs no new processes."""
    clips = [clip("a"), clip("fail"), clip("b")]
    result = driver.run(clips, tmp_path / "out", FakeRecipe(str(tmp_path / "log")), TWO)
    assert (result.made, result.failed) == (2, {"fail-0.png": "ValueError: bad <b> prompt"})
    assert sorted(stills(tmp_path / "out")) == ["a-0.png", "b-0.png"]
    assert made(str(tmp_path / "log")) == made(str(tmp_path / "log1")) == [each.key for each in clips]
    first, second = set(pids(tmp_path / "log")), set(pids(tmp_path / "log1"))
    assert len(first) == len(second) == 1 and first != second
    assert (tmp_path / "log.written").exists() and not (tmp_path / "log1.written").exists()


def test_a_rank_that_fails_alone_fails_the_clip_and_nothing_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "GRACE", 0.5)
    result = driver.run([clip("alone"), clip("a")], tmp_path / "out", FakeRecipe(str(tmp_path / "log")), TWO)
    assert (result.made, result.failed) == (1, {"alone-0.png": "rank 1: ValueError: only here"})
    assert result.seconds < 30


def test_a_rank_that_fails_when_the_video_is_made_costs_nothing(tmp_path: Path) -> None:
    result = driver.run([clip("late"), clip("a")], tmp_path / "out", FakeRecipe(str(tmp_path / "log")), TWO)
    assert result.made == 2 and len(set(pids(tmp_path / "log"))) == 1


def test_a_rank_that_dies_has_its_clip_tried_again(tmp_path: Path) -> None:
    """Also where the others fail by that before its death is seen."""
    clips = [clip("leave"), clip("a")]
    result = driver.run(clips, tmp_path / "out", FakeRecipe(str(tmp_path / "log")), TWO, retries=1)
    assert (result.made, result.failed) == (2, {})
    (tmp_path / "log1").unlink()
    again = driver.run([clip("leave", 1)], tmp_path / "out", FakeRecipe(str(tmp_path / "log")), TWO, retries=0)
    assert again.failed == {
        "leave-1.png": "the worker that made it died, 1 time: the process of its rank 1 was ended by SIGKILL"
    }


def test_a_rank_that_dies_while_it_waits_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    worker = Ranks(FakeRecipe(str(tmp_path / "log")), tmp_path, tmp_path / "stage", [None, None])
    try:
        assert told(worker) == [("ready", "")]
        first, second = worker.pids
        assert first is not None and second is not None
        os.kill(second, signal.SIGKILL)
        assert told(worker) == [("died", "the process of its rank 1 was ended by SIGKILL")]
    finally:
        worker.end()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_process_that_waits_has_more_time_to_end_than_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives a large model's memory back first. One that is killed leaves semaphores behind."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    worker = Ranks(FakeRecipe(str(tmp_path / "log")), tmp_path, tmp_path, [None])
    assert told(worker) == [("ready", "")]
    worker.end(idle=True)
    assert [process.exitcode for process in worker._processes] == [0]


def told(worker: Ranks) -> list[tuple[str, Any]]:
    until = time.monotonic() + 60
    while not (said := worker.receive()) and time.monotonic() < until:
        time.sleep(0.01)
    return said


# --- a pipeline -----------------------------------------------------------------------------------------------------


def planned(folder: Path, rows: str, model: Path, settings: Sequence[str] = METHOD) -> tuple[Plan, list[Clip]]:
    folder.mkdir(exist_ok=True)
    (folder / "p.csv").write_text(rows)
    given = {"--size": (48, 32), "--frames": 5, "--steps": 8}
    plan = Plan.read(
        *(folder / "p.csv",),
        model=str(model),
        method=settings[1],
        settings=settings[3:],
        given=given,
        fps=None,
        kind="png",
    )
    return plan, plan.clips(seed=0, seeds=1, names="hash", dtype=None, scale=None)


def alone(recipe: PipelineRecipe, clips: Sequence[Clip], folder: Path) -> None:
    """The clips as one process makes them."""
    manifest.prepare(folder)
    threads = torch.get_num_threads()
    worker = Worker(recipe, folder, folder / manifest.PRIVATE_FOLDER, "cpu")
    for each in clips:
        worker.make([each])
    torch.set_num_threads(threads)


def check_same(found: Path, expected: Path) -> None:
    """The same clips to tolerance, by the same decisions."""
    videos, others = stills(found), stills(expected)
    assert videos.keys() == others.keys() and videos
    for name, pixels in videos.items():
        difference = np.abs(pixels.astype(int) - others[name].astype(int)).max()
        assert difference <= TOLERANCE, name
        record, other = (json.loads((folder / name).with_suffix(".json").read_text()) for folder in (found, expected))
        assert record["clip"]["devices"] == 2
        assert decided(record) == decided(other), name


def decided(record: dict[str, Any]) -> Any:
    if record["report"] is None:
        return None
    steps = record["report"]["steps"]
    assert any(step["action"] != "compute" for step in steps)
    return [(step["denoiser"], step["index"], step["branch"], step["action"]) for step in steps]


@pytest.mark.slow
def test_two_ranks_make_the_clips_of_one_process(wan_folder: Path, tmp_path: Path) -> None:
    plan, clips = planned(tmp_path / "alone", PROMPTS, wan_folder)
    alone(PipelineRecipe(model=plan.model, threads=1), clips, tmp_path / "alone")
    where = ["-o", str(tmp_path / "two"), "--model", str(wan_folder), "--devices-per-clip", "2"]
    said = call(str(plan.file), *where, *SMALL, *METHOD)
    assert said.code == 1, said.err
    assert "4 clips made" in said.out and "2 failed" in said.out
    assert "width 50 is not a multiple of 16" in said.out
    assert "the tokens of this clip cannot be shared evenly by 2 devices" in said.out
    assert "died" not in said.err
    for clip_of_one in (tmp_path / "alone").glob("a-ball-*"):
        clip_of_one.unlink()  # its tokens can be computed by one
    check_same(tmp_path / "two", tmp_path / "alone")


@pytest.mark.slow
def test_both_denoisers_are_spread_and_a_killed_rank_is_recovered_from(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = WanPipeline.from_pretrained(wan_folder)
    torch.manual_seed(1)
    second = type(pipe.transformer).from_config(pipe.transformer.config)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.8)
    pipe.save_pretrained(tmp_path / "model")
    pipe.register_to_config(boundary_ratio=1.0)
    pipe.save_pretrained(tmp_path / "second alone")
    plan, clips = planned(tmp_path / "alone", "prompt,seed\na red ball,1 2 3\n", tmp_path / "model")
    recipe = PipelineRecipe(model=plan.model, threads=1)
    alone(recipe, clips, tmp_path / "alone")
    submit = Ranks.submit
    killed: list[int] = []

    def kill_one(self: Ranks, given: Sequence[Clip]) -> None:
        submit(self, given)
        pid = self.pids[1]
        if given[0].seed == 2 and not killed and pid is not None:
            killed.append(pid)
            threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()

    monkeypatch.setattr(Ranks, "submit", kill_one)
    result = driver.run(clips, tmp_path / "two", recipe, partial(LocalEngine, devices=["cpu"], ranks=2))
    assert (result.made, result.failed, len(killed)) == (3, {}, 1)
    base = manifest.Manifest(tmp_path / "two", readonly=True)
    assert [entry.attempts for entry in base.entries()] == [1, 2, 1]
    base.close()
    check_same(tmp_path / "two", tmp_path / "alone")
    plan, uneven = planned(tmp_path / "uneven", "prompt,size\na red ball,16x16\n", tmp_path / "second alone")
    recipe = PipelineRecipe(model=plan.model, threads=1)
    result = driver.run(uneven, tmp_path / "none", recipe, partial(LocalEngine, devices=["cpu"], ranks=2))
    assert all("shared evenly by 2 devices" in error for error in result.failed.values()) and result.made == 0
    assert {denoiser for denoiser, *_ in decided(record_of(tmp_path / "two"))} == {"transformer", "transformer_2"}


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads(next(folder.glob("*.json")).read_text())


@pytest.mark.slow
def test_an_actor_of_ray_starts_its_own_ranks(wan_folder: Path, tmp_path: Path) -> None:
    import ray

    plan, clips = planned(tmp_path / "alone", "prompt,seed,size\na red ball,1 2,\na star,,50x32\n", wan_folder)
    alone(PipelineRecipe(model=plan.model, threads=1), clips, tmp_path / "alone")
    where = ["-o", str(tmp_path / "two"), "--model", str(wan_folder), "--engine", "ray", "--devices-per-clip", "2"]
    try:
        said = call(str(plan.file), *where, *SMALL, *METHOD)
        engine = partial(on_two, ray)
        clips = [clip("leave"), clip("fail"), clip("a")]
        result = driver.run(clips, tmp_path / "fake", FakeRecipe(str(tmp_path / "log")), engine, retries=1)
    finally:
        ray.shutdown()
    assert said.code == 1 and "2 clips made" in said.out and "width 50 is not a multiple" in said.out, said.err
    check_same(tmp_path / "two", tmp_path / "alone")
    assert (result.made, result.failed) == (2, {"fail-0.png": "ValueError: bad <b> prompt"})


def on_two(ray: Any, setting: Any) -> Any:
    from unicp.batch.ray_engine import RayEngine

    return RayEngine(setting, ray, cpus=0.5, devices=[None, None])


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("mochi", ["2"], "no plan for context parallelism of a MochiTransformer3DModel"),
        ("demo", ["2"], "the 3 attention heads of this WanTransformer3DModel cannot be shared evenly by 2 devices"),
        ("demo", ["3", "--batch-size", "4"], "one clip on several; use one of both"),
        ("demo", ["3", "--engine", "ray", "--device", "cuda:1"], "--device cuda:1 is one device"),
    ],
)
def test_what_cannot_be_spread_is_refused_at_once(tmp_path: Path, model: str, options: list[str], said: str) -> None:
    if model == "mochi":
        model = str(tmp_path / model)
        Path(model).mkdir()
        index = {"_class_name": "MochiPipeline", "transformer": ["diffusers", "MochiTransformer3DModel"]}
        (tmp_path / "mochi" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "p.txt").write_text("a ball\n")
    where = ["-o", str(tmp_path / "out"), "--model", model, "--device", "cpu"]
    result = call(str(tmp_path / "p.txt"), *where, "--devices-per-clip", *options)
    assert result.code == 2 and said in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()
