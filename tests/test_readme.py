"""The numbers in the README and in docs/results.md are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from PIL import Image

import unicp
from benchmarks import figures, readme
from benchmarks import race as racing
from unicp.offline.candidates import cost_in_runs


def test_the_figures_of_the_readme_are_the_committed_ones() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.BEGIN in text and readme.END in text
    assert readme.block() in text, "run: python -m benchmarks.readme"


def test_the_results_page_is_made_of_the_committed_ones() -> None:
    assert (readme.ROOT / "docs" / "results.md").read_text() == readme.page(), "run: python -m benchmarks.readme"


def test_the_readme_is_read_in_a_minute() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in snippet.splitlines() if line]) == 5 and "BudgetConfig(target_speedup=2)" in snippet


def test_the_moving_picture_has_the_clocks_of_the_committed_comparison() -> None:
    """As long as the unaccelerated clock runs, and then both videos twice; small enough for a README."""
    at_50 = figures.read_comparison(readme.RESULTS / "compare-50.json")
    race = racing.runners(at_50)
    assert [runner.method for runner in race.runners][:2] == ["unaccelerated", "budget"]
    with Image.open(racing.MOVING) as moving:
        seconds = moving.n_frames / racing.RATE - 2 * unicp.demo.FRAMES / racing.RATE
        assert abs(seconds - race.runners[0].seconds) <= 1 / racing.RATE
    assert racing.MOVING.stat().st_size < 2 * 2**20


def test_the_curves_are_drawn_from_the_committed_comparison(tmp_path: Path) -> None:
    racing.curves(figures.read_comparison(readme.RESULTS / "compare-50.json"), tmp_path / "curves.svg")
    drawn, committed = (
        re.findall(r'<path d="(M [^"]*)" clip-path', path.read_text())
        for path in (tmp_path / "curves.svg", racing.CURVES)
    )
    assert drawn and drawn == committed, "run: python -m benchmarks.race"


def test_what_tuning_takes_is_what_it_will_say() -> None:
    text = " ".join((readme.ROOT / "docs" / "choosing.md").read_text().split())
    low, medium, high = (f"{round(cost_in_runs(8, effort, True), -1):.0f}" for effort in ("low", "medium", "high"))
    assert f"as long as about {low} videos with `--effort low`, {medium} with `medium`, and {high} with `high`" in text
    shown = " ".join((readme.ROOT / "README.md").read_text().split())
    low, medium = (f"{round(cost_in_runs(16, effort, True), -1):.0f}" for effort in ("low", "medium"))
    assert f"16 prompts or more: that takes as long as making {medium} videos ({low} with `--effort low`)" in shown


def test_make_bench_repeats_what_was_measured() -> None:
    made = {line.strip().removeprefix("$(BIN)/") for line in (readme.ROOT / "Makefile").read_text().splitlines()}
    apart = ("benchmarks.compare", "benchmarks.codebook")  # make bench-compare measures all; codebooks are data
    for file in readme.RESULTS.glob("*.json"):
        command = json.loads(file.read_text()).get("provenance", {}).get("command")
        if command is not None and not any(module in command for module in apart):
            assert command in made, file.name
