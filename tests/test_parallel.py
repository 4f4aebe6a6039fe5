"""Context parallelism on four real processes: two replicas of a model, each spread over two.

All processes of a replica decide the same, from the whole sequence, and what they make is what one process makes.
Processes import torch and diffusers, so each test takes some ten seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import fresh
from tests.parallel_runs import REPLICAS

ROOT = Path(__file__).parents[1]
SECONDS = 150  # far more than it takes; a hang is a failure


def processes(scenario: str, folder: Path) -> list[dict[str, Any]]:
    """What each of the four processes returned."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.parallel_runs", scenario]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        for rank in range(4)
    ]
    try:
        said = [process.communicate(timeout=SECONDS)[1].decode()[-2000:] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * 4, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]


def decided(actions: Any) -> Any:
    return [action[:4] for action in actions]


def check(found: dict[str, Any], partner: dict[str, Any], replica: int) -> None:
    assert found.keys() == partner.keys()
    for name, run in found.items():
        assert run["actions"] == partner[name]["actions"], name  # to the last digit: all look at the same numbers
        assert torch.equal(run["latents"], partner[name]["latents"])
        assert not run["kept"]
        latents, actions = fresh("wan", "adacache-residual" if name == "after" else name, **REPLICAS[replica])[:2]
        assert decided(run["actions"]) == decided(actions), name
        torch.testing.assert_close(run["latents"], latents, rtol=1e-4, atol=1e-4)
        measured = [(a[4], b[4]) for a, b in zip(run["actions"], actions, strict=True) if b[4] is not None]
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in measured), name


def test_replicas_of_two_processes_decide_as_one_process(tmp_path: Path) -> None:
    found = processes("together", tmp_path)
    for replica in (0, 1):
        check(found[2 * replica], found[2 * replica + 1], replica)


def test_a_process_that_fails_ends_its_partner_too(tmp_path: Path) -> None:
    """What diffusers and torch do, and unicp does not stand in the way of: an error on both, in bounded time."""
    found = processes("failing", tmp_path)
    for rank, one in enumerate(found):
        assert one["seconds"] < 65, one
        assert ("this one fails" in one["error"]) == (rank % 2 == 1)


@pytest.mark.slow
def test_what_cannot_be_spread_is_refused(tmp_path: Path) -> None:
    for said in processes("refused", tmp_path):
        assert "pcas=False" in said["maps"]
        assert "tokens divide evenly" in said["uneven"]
        assert "do one of both" in said["compiled"]
        assert "in one process" in said["calibrate"]
