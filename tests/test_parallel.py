"""Context parallelism on four real processes: two replicas of a model, each spread over two.

All processes of a replica decide the same, from the whole sequence, and what they make is what one process makes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract import fresh, plain
from tests.parallel_runs import REPLICAS, SHARDED

ROOT = Path(__file__).parents[1]
SECONDS = 300  # far more than it takes, also on a busy machine; a hang is a failure


def processes(scenario: str, folder: Path) -> list[dict[str, Any]]:
    """What each of the four processes returned."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.parallel_runs", scenario, str(folder)]
    running = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        running.wait(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them, should one hang
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert running.returncode == 0, "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log")))
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
        measured = [(a[5], b[5]) for a, b in zip(run["actions"], actions, strict=True) if b[5] is not None]
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in measured), name
        assert bool(measured) == (not name.startswith(("schedule", "unicp"))), name


def test_replicas_of_two_processes_decide_as_one_process(tmp_path: Path) -> None:
    found = processes("together", tmp_path)
    for replica in (0, 1):
        check(found[2 * replica], found[2 * replica + 1], replica)


@pytest.mark.slow
def test_ring_attention_decides_as_one_process(tmp_path: Path) -> None:
    found = processes("ring", tmp_path)
    for replica in (0, 1):
        check(found[2 * replica], found[2 * replica + 1], replica)


@pytest.mark.slow
def test_ring_attention_on_cpus_says_what_diffusers_says(tmp_path: Path) -> None:
    """diffusers has no attention for CPUs that its ring can use: the same error on all processes, and no hang."""
    theirs = "ValueError: Native attention does not support return_lse=True"
    for said in processes("ring_as_it_is", tmp_path):
        runs = {f"{name} {again}": theirs for name in (None, "adacache-residual") for again in (1, 2)}
        assert said == {**runs, "None kept": 0, "adacache-residual kept": 0}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["guidance", "guidance_further"])
def test_branches_of_guidance_on_two_processes(scenario: str, tmp_path: Path) -> None:
    """What the two measure goes into one number, and what they make is what one process makes of both branches."""
    found = processes(scenario, tmp_path)
    for replica in (0, 1):
        first, second = found[2 * replica : 2 * replica + 2]
        for name in first:
            assert torch.equal(first[name]["latents"], second[name]["latents"]), name
            assert not first[name]["kept"] and not second[name]["kept"]
            if "alone" not in name:
                assert first[name]["actions"] == second[name]["actions"], name
        for name in first.keys() - {"computed", "computed alone", "torn", "torn alone"}:
            assert any(action[3] != "compute" for action in first[name]["actions"]), name
        plain_latents = plain("wan", **REPLICAS[replica])
        torch.testing.assert_close(first["computed"]["latents"], plain_latents, rtol=1e-4, atol=1e-4)
        columns = [first["computed"], first["computed alone"], second["computed alone"]]
        measured = [[a[5] for a in one["actions"] if a[5] is not None] for one in columns]
        assert len(measured[0]) == REPLICAS[replica]["steps"] - 1
        for joint, a, b in zip(*measured, strict=True):
            assert min(a, b) < joint < max(a, b)
        assert decided(first["torn alone"]["actions"]) != decided(second["torn alone"]["actions"])


@pytest.mark.slow
def test_processes_that_share_sharded_weights_skip_the_same_steps(tmp_path: Path) -> None:
    """Each makes a video of its own, which is that of one process with all the weights."""
    for rank, found in enumerate(results := processes("sharded", tmp_path)):
        for name, run in found.items():
            assert run["actions"] == results[rank ^ 1][name]["actions"], name  # to the last digit of what is shared
            assert any(action[3] != "compute" for action in run["actions"]) and not run["kept"], name
            if name in SHARDED:
                request = {**REPLICAS[rank // 2], "seed": rank}
                torch.testing.assert_close(run["latents"], fresh("wan", name, **request)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
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
