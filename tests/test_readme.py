"""The numbers in the README and in docs/results.md are those of the committed results."""

from __future__ import annotations

import json

from benchmarks import readme
from unicp.offline.candidates import cost_in_runs


def test_the_figures_of_the_readme_are_the_committed_ones() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.BEGIN in text and readme.END in text
    assert readme.block() in text, "run: python -m benchmarks.readme"


def test_the_results_page_is_made_of_the_committed_ones() -> None:
    assert (readme.ROOT / "docs" / "results.md").read_text() == readme.page(), "run: python -m benchmarks.readme"


def test_what_tuning_takes_is_what_it_will_say() -> None:
    text = " ".join((readme.ROOT / "README.md").read_text().split())
    low, medium, high = (f"{round(cost_in_runs(8, effort), -1):.0f}" for effort in ("low", "medium", "high"))
    assert f"of about {low} videos with `--effort low`, of {medium} with `medium`, and of {high} with `high`" in text


def test_make_bench_repeats_what_was_measured() -> None:
    made = {line.strip().removeprefix("$(BIN)/") for line in (readme.ROOT / "Makefile").read_text().splitlines()}
    apart = ("benchmarks.compare", "benchmarks.codebook")  # make bench-compare measures all; codebooks are data
    for file in readme.RESULTS.glob("*.json"):
        command = json.loads(file.read_text()).get("provenance", {}).get("command")
        if command is not None and not any(module in command for module in apart):
            assert command in made, file.name
