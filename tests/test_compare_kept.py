"""``unicp.compare`` goes on: after an interruption, with other methods, in another hour, from another comparison."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import unicp
from benchmarks.compare import joined, table
from tests.test_compare import CALL, FEW, PROMPTS
from unicp import ScheduleConfig
from unicp.bench import compare as module
from unicp.bench import peers, provenance, source
from unicp.bench.results import Failure


def test_an_interrupted_comparison_continues(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = module.generate
    monkeypatch.setattr(module, "generate", lambda *args, **more: made.append(1) or real(*args, **more))
    methods = [ScheduleConfig(interval=2), "fewer-steps=2"]

    def stop(at: module.Progress) -> None:
        if at.done == 6:
            raise KeyboardInterrupt

    path = tmp_path / "kept.sqlite"
    arguments: dict[str, Any] = {"results": path, **FEW}
    with pytest.raises(KeyboardInterrupt):
        unicp.compare(pipe, methods, PROMPTS, progress=stop, **arguments)
    assert len(made) == 6
    seen: list[module.Progress] = []
    first = unicp.compare(pipe, methods, PROMPTS, progress=seen.append, **arguments)
    # Three timed runs were left, in a process that has to be warmed up for each of the three again.
    assert len(made) == 6 + 3 + 3
    assert seen[-1].done == seen[-1].total == 9
    again = unicp.compare(pipe, methods, PROMPTS, progress=False, **arguments)
    assert len(made) == 12
    assert again.to_dict()["summary"] == first.to_dict()["summary"]
    made.clear()
    unicp.compare(pipe, methods, PROMPTS, progress=False, seed=1, **arguments)
    assert made  # another seed is another result


def test_another_process_goes_on_too(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scheduler's configuration says of defaults is made from a set: in another order in every process."""
    arguments: dict[str, Any] = {"results": tmp_path / "kept.sqlite", "progress": False, **FEW}
    pipe.scheduler.register_to_config(_use_default_values=["solver_order", "beta_start"])
    unicp.compare(pipe, ["control"], PROMPTS[:1], **arguments)
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("it is measured again"))
    pipe.scheduler.register_to_config(_use_default_values=["beta_start", "solver_order"])
    unicp.compare(pipe, ["control"], PROMPTS[:1], **arguments)


@pytest.mark.slow
def test_what_is_new_is_timed_against_the_machine_of_its_own_hour(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seconds, made = module.generate, [1.0], []

    def timed(*args: Any, **more: Any) -> Any:
        made.append(1)
        return replace(real(*args, **more), loop_seconds=seconds[0], total_seconds=seconds[0])

    monkeypatch.setattr(module, "generate", timed)
    arguments: dict[str, Any] = {"results": tmp_path / "kept.sqlite", "progress": False, "repeats": 2, **CALL}
    first = unicp.compare(pipe, ["fewer-steps=3"], PROMPTS, **arguments)
    seconds[0] = 2.0  # the machine has become slower
    made.clear()
    both = unicp.compare(pipe, ["fewer-steps=3:2"], PROMPTS, **arguments)
    # A discarded run and four timed ones, and beside these the unaccelerated one, which has to be warmed up, too.
    assert len(made) == 1 + 4 + 4 + 1
    assert [row.loop_speedup.value for row in both.rows()] == [1.0, 1.0]
    assert [result.loop_seconds for result in both.baseline.results] == [2.0] * 4
    assert [result.beside for result in both.points[0].results] == [{"loop_seconds": 1.0, "total_seconds": 1.0}] * 4
    assert both.points[0].measured("psnr") == first.points[0].measured("psnr")
    made.clear()
    again = unicp.compare(pipe, ["fewer-steps=3:2"], PROMPTS, **arguments)
    assert not made and [row.loop_speedup.value for row in again.rows()] == [1.0, 1.0]
    before = replace(again.points[1].results[0], beside=None)  # as kept by versions that did not write it
    assert again.beside(before)["loop_seconds"] == 1.0


@pytest.mark.slow
def test_the_benchmark_takes_over_what_it_does_not_measure(pipe: Any) -> None:
    old, new, other = (
        unicp.compare(pipe, methods, PROMPTS[:1], seed=seed, progress=False, **CALL)
        for methods, seed in ((["control", "fewer-steps=2", "pab=0.5"], 0), (["control"], 0), (["control"], 1))
    )
    old.provenance["scheduler"]["_use_default_values"] = ["trained_betas"]  # as older ones have it
    both = joined(new, old)
    assert [point.method for point in both.points] == ["control", "fewer-steps"]
    assert both.points[0] is new.points[0] and both.baseline is new.baseline
    assert both.points[1].results[0].beside == old.baseline.results[0].seconds
    assert both.rows()[1].loop_speedup == old.rows()[1].loop_speedup
    assert [failure.method for failure in both.failures] == ["pab"]
    (kept,) = both.provenance["kept"]
    assert kept["methods"] == ["fewer-steps"] and kept["date"] == old.provenance["date"]
    assert "Taken over from before: fewer-steps. `" in table(both)
    # What was taken over once keeps its own origin, and what is not asked for twice is not listed twice.
    later = unicp.compare(pipe, ["pab=0.5"], PROMPTS[:1], progress=False, **CALL)
    again = joined(later, both)
    assert [one["methods"] for one in again.provenance["kept"]] == [["control"], ["fewer-steps"]]
    assert [failure.method for failure in again.failures] == ["pab"]
    broken = replace(later, failures=(Failure("fewer-steps", "", "it broke"),))
    assert [point.method for point in joined(broken, both).points] == ["control"]
    with pytest.raises(SystemExit, match="--keep: that comparison is of another seed"):
        joined(new, other)
    with pytest.raises(SystemExit, match="--keep: that comparison is of another call and prompts"):
        joined(new, unicp.compare(pipe, ["control"], PROMPTS[1:], progress=False, **{**CALL, "guidance_scale": 2.0}))


@pytest.mark.slow
def test_results_of_other_code_are_made_again(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = module.generate
    monkeypatch.setattr(module, "generate", lambda *args, **more: made.append(1) or real(*args, **more))
    versions = {"methods": "1.dev0+a", "measuring": "1.dev0+a"}
    for place in (peers, provenance):
        monkeypatch.setattr(place, "code_version", versions.__getitem__)

    def count() -> int:
        made.clear()
        methods = [ScheduleConfig(interval=2), "fewer-steps=3"]
        unicp.compare(pipe, methods, PROMPTS[:1], results=tmp_path / "kept.sqlite", progress=False, **CALL)
        return len(made)

    assert count() == 6 and count() == 0
    versions["methods"] = "1.dev0+b"
    assert count() == 4  # of our method the discarded run and the timed one; the unaccelerated one beside it, warmed up
    versions["measuring"] = "1.dev0+b"
    assert count() == 6


def test_the_source_has_a_digest_in_development(tmp_path: Path) -> None:
    kinds = [source.code_version(part, "2.0.dev1") for part in ("methods", "measuring")]
    assert all(re.fullmatch(r"2\.0\.dev1\+[0-9a-f]{8}", kind) for kind in kinds) and kinds[0] != kinds[1]
    assert source.code_version("methods", "2.0") == "2.0"
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("a")
    two.write_text("b")
    before = source.digest([one, two], tmp_path)
    assert source.digest([two, one], tmp_path) == before
    two.write_text("c")
    assert source.digest([one, two], tmp_path) != before
