"""``unicp.batch`` without a model: the manifest, the lock, and workers that fail and die."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.batch_fakes import ENVIRONMENT, ROOT, FakeRecipe, clip, made, noise, render, stills
from unicp import UnicpError
from unicp.batch import driver, lock, manifest, progress
from unicp.batch.clips import Outcome
from unicp.batch.local import LocalEngine
from unicp.batch.worker import Worker, is_broken


def strip(seed: int) -> Any:
    return np.concatenate(list(noise(seed)), axis=1)


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_a_batch_and_again(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", str(tmp_path / "log")
    clips = [clip("a ball", seed) for seed in range(6)]
    result = render(folder, clips, FakeRecipe(log, seconds=0.5), workers=2)  # long enough for both to start
    assert (result.asked, result.found, result.made, result.failed) == (6, 0, 6, {})
    for seed in range(6):
        assert (stills(folder)[f"a-ball-{seed}.png"] == strip(seed)).all()
        record = json.loads((folder / f"a-ball-{seed}.json").read_text())
        assert record["clip"]["key"] == clips[seed].key
        assert record["video"]["bytes"] == (folder / f"a-ball-{seed}.png").stat().st_size
    assert len({line.split()[1] for line in Path(log).read_text().splitlines()}) == 2  # both worked
    before = {path: path.stat().st_mtime_ns for path in folder.glob("a-*")}
    again = render(folder, [*clips, clip("a ball", 6)], workers=2)
    assert (again.asked, again.found, again.made) == (7, 6, 1)
    assert Counter(made(log)) == Counter(each.key for each in [*clips, clip("a ball", 6)])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in folder.glob(".batch/*")) == ["lock", "manifest.sqlite"]


def test_clips_are_made_again_if_that_is_asked_for(tmp_path: Path) -> None:
    clips = [clip("a ball", seed) for seed in range(2)]
    render(tmp_path / "out", clips)
    assert render(tmp_path / "out", clips, resume=False).made == 2
    assert Counter(made(str(tmp_path / "log"))) == {each.key: 2 for each in clips}
    assert render(tmp_path / "out", clips).found == 2


def test_torn_and_missing_files_are_made_again(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", str(tmp_path / "log")
    clips = [clip("a ball", seed) for seed in range(5)]
    render(folder, clips)
    names = [folder / each.name for each in clips]
    names[0].unlink()
    names[1].write_bytes(names[1].read_bytes()[:-5])
    record = manifest.record_path(names[2])
    record.write_text(record.read_text()[:-5])
    shutil.copy(manifest.record_path(names[4]), manifest.record_path(names[3]))  # another clip's
    render(folder, clips)
    assert made(log)[5:] == [each.key for each in clips[:4]]
    assert all((stills(folder)[path.name] == strip(seed)).all() for seed, path in enumerate(names))


def test_clips_that_a_killed_batch_had_finished_are_found(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", str(tmp_path / "log")
    clips = [clip("a ball", seed) for seed in range(3)]
    render(folder, clips)
    base = manifest.Manifest(folder)
    base.start([each.key for each in clips], 0)  # as it was in the middle
    base.close()
    damaged = bytearray((folder / clips[1].name).read_bytes())
    damaged[-20] ^= 1  # of the right size, but not what was written
    (folder / clips[1].name).write_bytes(bytes(damaged))
    result = render(folder, clips)
    assert (result.found, result.made) == (2, 1)
    assert made(log)[3:] == [clips[1].key]
    base = manifest.Manifest(folder, readonly=True)
    assert base.counts() == {"pending": 0, "running": 0, "done": 3, "failed": 0}
    assert base.entries()[0].fraction == 0.5


def test_a_name_of_another_clip_is_refused(tmp_path: Path) -> None:
    first = clip("a ball")
    render(tmp_path / "out", [first])
    with pytest.raises(UnicpError, match=r"a-ball-0\.png is a clip of another batch"):
        render(tmp_path / "out", [replace(first, key="other")])


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    render(tmp_path / "out", [clip("a")])
    base = manifest.Manifest(tmp_path / "out")
    base._base.execute("PRAGMA user_version = 99")
    base.close()
    with pytest.raises(UnicpError, match=r"begun by a later unicp \(format 99\)"):
        render(tmp_path / "out", [clip("a")])


# --- two at once ----------------------------------------------------------------------------------------------------


def test_the_second_batch_is_refused(tmp_path: Path) -> None:
    private = manifest.prepare(tmp_path / "out")
    with lock.Lock(private):
        with pytest.raises(UnicpError) as caught:
            render(tmp_path / "out", [clip("a")])
        assert lock.is_alive(lock.owner(private)) is True
    said = str(caught.value)
    assert f"another batch works on {tmp_path / 'out'}: process {os.getpid()} on " in said and "\n" not in said
    assert made(str(tmp_path / "log")) == []
    assert render(tmp_path / "out", [clip("a")]).made == 1


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    private = manifest.prepare(tmp_path / "out")
    code = (
        "import pathlib, sys, time; from unicp.batch.lock import Lock\n"
        f"with Lock(pathlib.Path({str(private)!r})): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(UnicpError, match=f"process {other.pid} on"):
        render(tmp_path / "out", [clip("a")])
    other.kill()
    other.wait()
    assert lock.is_alive(lock.owner(private)) is False
    assert render(tmp_path / "out", [clip("a")]).made == 1


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failing_prompt_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = render(folder, [clip("a"), clip("fail"), clip("b")])
    assert (result.made, result.failed) == (2, {"fail-0.png": "ValueError: bad <b> prompt"})
    assert sorted(stills(folder)) == ["a-0.png", "b-0.png"]
    base = manifest.Manifest(folder, readonly=True)
    assert [(entry.state, entry.error) for entry in base.entries()][1] == ("failed", "ValueError: bad <b> prompt")
    sheet = result.summary.read_text()
    assert sheet.count("data:image/jpeg;base64,") == 2
    assert "bad &lt;b&gt; prompt" in sheet and "2 of 3 clips; 50% of the denoiser" in sheet
    assert render(folder, [clip("a"), clip("fail"), clip("b")]).found == 2  # the failed one was tried again


def test_a_worker_that_dies_is_replaced_and_its_clip_tried_again(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    console = Console(file=io.StringIO(), width=500)
    clips = [clip("kill"), clip("a"), clip("once"), clip("b")]
    result = render(tmp_path / "out", clips, workers=2, retries=1, progress=progress.Progress(console))
    assert result.made == 3
    assert result.failed == {
        "kill-0.png": "the worker that made it died, 2 times: its process was ended by SIGKILL",
    }
    counts = Counter(made(log))
    assert counts == {clips[0].key: 2, clips[1].key: 1, clips[2].key: 2, clips[3].key: 1}
    assert "died: its process was ended by SIGKILL; it is replaced" in console.file.getvalue()  # type: ignore[attr-defined]


def test_clips_of_a_batch_that_fails_are_tried_alone(tmp_path: Path) -> None:
    clips = [clip("a"), clip("crowd"), clip("once"), clip("b")]
    result = render(tmp_path / "out", clips, batch_size=3)
    assert sorted(stills(tmp_path / "out")) == ["a-0.png", "b-0.png", "once-0.png"]
    assert result.failed == {"crowd-0.png": "ValueError: bad"}
    lines = (tmp_path / "log").read_text().splitlines()
    assert {line.split()[2] for line in lines[:3]} == {"3"} and {line.split()[2] for line in lines[3:]} == {"1"}


def test_a_model_that_cannot_be_loaded_ends_the_batch(tmp_path: Path) -> None:
    with pytest.raises(UnicpError, match="no worker is left, and 2 clips are to do: RuntimeError: no such weights"):
        render(tmp_path / "out", [clip("a"), clip("b")], FakeRecipe("", unloadable=True), workers=2)
    base = manifest.Manifest(tmp_path / "out", readonly=True)
    assert base.counts()["pending"] == 2


def test_a_worker_that_cannot_load_the_model_is_not_tried_again(tmp_path: Path) -> None:
    """The others make its clips."""
    clips = [clip("a", seed) for seed in range(8)]
    recipe = FakeRecipe(str(tmp_path / "log"), seconds=0.5, without="bad")
    engine = partial(LocalEngine, devices=["good", "bad"])
    assert driver.run(clips, tmp_path / "out", recipe, engine, workers=2).made == 8
    assert sorted((tmp_path / "log.loads").read_text().split()) == ["bad", "good"]


def test_a_full_disk_is_refused_ahead_and_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [driver.RESERVE + 10**6]
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    large = [replace(clip("a", seed), expected_bytes=10**6) for seed in range(2)]
    with pytest.raises(UnicpError, match=r"2 clips take about 1\.9 MiB, and 65\.0 MiB are free on the disk of"):
        render(tmp_path / "out", large)
    with pytest.raises(UnicpError, match=r"is nearly full, 1 clips are to do; free some space and run it again"):
        render(tmp_path / "out", large[:1])
    assert made(str(tmp_path / "log")) == []
    free[0] *= 2
    assert render(tmp_path / "out", large).made == 2


def test_an_error_that_breaks_the_gpu_is_known() -> None:
    assert is_broken([Outcome(key="a"), Outcome(key="b", error="RuntimeError: CUDA error: an illegal memory access")])
    assert not is_broken([Outcome(key="a", error="OutOfMemoryError: CUDA out of memory"), Outcome(key="b")])


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="all machines of a batch need to share it"):
        Worker(FakeRecipe(""), tmp_path, tmp_path / "none")


def test_a_batch_ends_without_a_word(tmp_path: Path) -> None:
    """Workers end by themselves: one that is terminated leaves semaphores behind, which Python complains of."""
    command = [sys.executable, "-m", "tests.batch_fakes", str(tmp_path / "out"), "2", "0", "local"]
    environment = {**ENVIRONMENT, "UNICP_TEST_SEMAPHORE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_warning_is_told_once_whatever_its_figures() -> None:
    console = Console(file=io.StringIO(), width=200)
    shown = progress.Progress(console)
    for number in range(3):
        shown.count(Outcome(key=str(number), warnings=(f"the change was 0.{number}", "look out")), "a.mp4")
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said == ["warning: the change was 0.0", "warning: look out"]


def test_a_stop_leaves_no_half_file_and_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Progress, "count", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        render(tmp_path / "out", [clip("a", seed) for seed in range(4)], workers=2)
    base = manifest.Manifest(tmp_path / "out", readonly=True)
    assert base.counts()["running"] == 0 and base.counts()["done"] >= 1
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.suffix == ".part")
    assert left == [] and not list((tmp_path / "out" / ".batch").glob("stage-*"))


def test_workers_do_not_see_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to all processes; the driver alone decides what becomes of it."""
    start = LocalEngine.restart

    def interrupted(self: LocalEngine, worker: int) -> None:
        start(self, worker)
        (pid,) = self._workers[worker].pids
        assert pid is not None
        for _ in range(20):  # while it begins and while it works
            os.kill(pid, signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(LocalEngine, "restart", interrupted)
    result = render(tmp_path / "out", [clip("a")])
    assert (result.made, made(str(tmp_path / "log"))) == (1, [clip("a").key])


def test_a_worker_whose_gpu_is_in_error_is_replaced(tmp_path: Path) -> None:
    clips = [clip("gpu"), clip("a"), clip("b")]
    result = render(tmp_path / "out", clips)
    assert (result.made, list(result.failed)) == (2, ["gpu-0.png"])
    pids = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert pids[0] != pids[1] == pids[2]
    more = [clip("x"), clip("gpu", 1), clip("y")]
    result = render(tmp_path / "out", more, batch_size=3)  # the others of a forward are not to blame
    assert (result.made, list(result.failed)) == (2, ["gpu-1.png"])


def test_progress_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "HEARTBEAT", 0)
    console = Console(file=io.StringIO(), width=20)
    recipe = FakeRecipe(str(tmp_path / "log"), 0.02)
    clips = [clip("a", seed) for seed in range(4)]
    render(tmp_path / "out", clips, recipe, progress=progress.Progress(console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("0/4 clips")
    assert "4/4 clips, " in lines[-1] and " a minute, 0 s left, 50% of the operations; workers: 1 idle" in lines[-1]


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW", 0)
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    render(
        tmp_path / "out", [clip("a", 1)], FakeRecipe(str(tmp_path / "log"), 0.02), progress=progress.Progress(console)
    )
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "worker 0: making 0 s  a-1.png" in shown and "0/1 clips" in shown
