"""Three hundred videos in a row: what the last ones are made of, and what is left of the first ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MEBIBYTE = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and forks with threads about")
def test_three_hundred_videos_of_changing_requests_configs_and_events() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "300"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == 840
    assert found["other"] == []
    # All sizes, configs and events were seen by then; the videos after them add nothing.
    middle, last = found["held"][5], found["held"][-1]
    assert last["tensors"] == middle["tensors"] and last["bytes"] == middle["bytes"], found["held"]
    assert abs(last["ours"] - middle["ours"]) < 100, found["held"]
    assert last["objects"] < middle["objects"] + 2000, found["held"]
    assert last["resident"] < middle["resident"] + 16 * MEBIBYTE, found["held"]
