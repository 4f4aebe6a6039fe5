"""Batches that are killed with SIGKILL, workers and drivers, and go on: every clip is there once and whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.batch_fakes import ENVIRONMENT, ROOT, clip, made, noise, stills
from unicp.batch import manifest

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "30", "--threads", "1", "--device", "cpu", "--format", "png"]
METHOD = ["--method", "adacache", "--set", "codebook=((0.5, 3), (1.0, 2))"]
KILLS = 10
"""Of each engine."""
SEEDS = 70


def strip(seed: int) -> Any:
    return np.concatenate(list(noise(seed)), axis=1)


def workers_of(driver: int) -> list[int]:
    """Processes of a driver's workers, local ones or Ray's: they descend from it."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,command="], capture_output=True, text=True).stdout
    processes = [line.split(None, 2) for line in listed.splitlines()]
    family = {driver}
    for _ in range(4):  # Ray puts another process between
        family |= {int(pid) for pid, parent, *_ in processes if int(parent) in family}
    names = ("spawn_main", "ray::RayWorker")
    return [int(pid) for pid, _, *said in processes if int(pid) in family and any(n in "".join(said) for n in names)]


def check_whole(folder: Path, count: int, log: Path, kills: int) -> None:
    """Every clip is there once and whole, and no more was made than what was in flight at a kill."""
    pictures = stills(folder)
    assert sorted(pictures) == sorted(f"a-ball-{seed}.png" for seed in range(count))
    for seed in range(count):
        assert (pictures[f"a-ball-{seed}.png"] == strip(seed)).all()
        video = folder / f"a-ball-{seed}.png"
        assert manifest.read_whole(video, clip("a ball", seed).key, deep=True) is not None
    begun = Counter(made(str(log)))
    assert len(begun) == count
    assert sum(begun.values()) <= count + 2 * kills
    assert not [path for path in folder.iterdir() if path.suffix not in (".png", ".json", ".html") and path.is_file()]


def test_a_killed_driver_takes_its_workers_along_and_the_rest_is_made(tmp_path: Path) -> None:
    folder, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-m", "tests.batch_fakes", str(folder), "12", "0.1", "local"]
    first = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while len(made(str(log))) < 5:
        time.sleep(0.01)
    workers = workers_of(first.pid)
    assert len(workers) == 2
    first.kill()
    first.wait()
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_whole(folder, 12, log, 1)
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists() and _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_twenty_kills_at_random_moments_lose_nothing(engine: str, tmp_path: Path) -> None:
    folder, log, count = tmp_path / "out", tmp_path / "log", 150
    random = np.random.default_rng(0)
    kills = {"worker": 0, "driver": 0}
    command = [sys.executable, "-m", "tests.batch_fakes", str(folder), str(count), "0.1", engine]
    process = None
    while sum(kills.values()) < 20:
        if process is None or process.poll() is not None:
            process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
            time.sleep(0.5)
        time.sleep(random.uniform(0.05, 0.6))
        workers = workers_of(process.pid)
        if process.poll() is not None or not workers:
            continue
        which = "driver" if random.random() < 0.5 else "worker"
        os.kill(process.pid if which == "driver" else int(random.choice(workers)), signal.SIGKILL)
        kills[which] += 1
        if which == "driver":
            process.wait()
    assert process is not None
    process.wait()
    assert min(kills.values()) >= 5
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_whole(folder, count, log, 20)


# --- a pipeline ----------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_kills_at_random_moments_lose_no_clip(engine: str, wan_folder: Path, tmp_path: Path) -> None:
    """Workers and the driver get SIGKILL; the same command goes on; all is as if nothing had happened."""
    (tmp_path / "p.txt").write_text("a red ball\na blue star\na fast ball\n")
    folder, reference = tmp_path / "out", tmp_path / "reference"

    def command(target: Path) -> list[str]:
        where = [
            "-o",
            str(target),
            "--model",
            str(wan_folder),
            "--engine",
            engine,
            "--workers",
            "2",
            "--seeds",
            str(SEEDS),
        ]
        return [sys.executable, "-m", "unicp", "batch", str(tmp_path / "p.txt"), *where, *SMALL, *METHOD]

    random = np.random.default_rng(1)
    kills = {"driver": 0, "worker": 0}
    process: Any = None
    while sum(kills.values()) < KILLS:
        if process is None or process.poll() is not None:
            process = subprocess.Popen(
                command(folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        wanted = "driver" if kills["driver"] <= kills["worker"] else "worker"
        deadline = time.monotonic() + 300  # on a machine that has much else to do
        victims: list[int] = []
        while process.poll() is None and not victims:
            assert time.monotonic() < deadline, "no worker was started"
            time.sleep(0.1)
            victims = workers_of(process.pid)
        time.sleep(random.uniform(0, 3))
        if process.poll() is not None:
            break  # it was done before it could be killed
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid if wanted == "driver" else int(random.choice(victims)), signal.SIGKILL)
            kills[wanted] += 1
        if wanted == "driver":
            process.wait()
    process.wait()
    again = subprocess.run(command(folder), env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert sum(kills.values()) == KILLS
    assert subprocess.run(command(reference), env=ENVIRONMENT, capture_output=True).returncode == 0
    assert files(folder) == files(reference) and len(files(folder)) == 3 * SEEDS
    base = manifest.Manifest(folder, readonly=True)
    entries = base.entries()
    assert base.counts() == {"pending": 0, "running": 0, "done": 3 * SEEDS, "failed": 0}
    assert all(manifest.read_whole(folder / entry.name, entry.key, deep=True) for entry in entries)
    # Each kill cost at most the clips in flight: two of the driver's, one of a worker's.
    assert sum(entry.attempts - 1 for entry in entries) <= 2 * kills["driver"] + kills["worker"]
    left = [path.name for path in folder.iterdir() if path.suffix not in (".png", ".json", ".html") and path.is_file()]
    assert left == []
