"""The numbers in the README and in docs/results.md are those of the committed results."""

from __future__ import annotations

from benchmarks import readme
from unicp.efforts import cost_in_runs


def test_the_figures_of_the_readme_are_the_committed_ones() -> None:
    text = (readme.ROOT / "README.md").read_text()
    assert readme.BEGIN in text and readme.END in text
    assert readme.block() in text, "run: python -m benchmarks.readme"


def test_the_results_page_is_made_of_the_committed_ones() -> None:
    assert (readme.ROOT / "docs" / "results.md").read_text() == readme.page(), "run: python -m benchmarks.readme"


def test_what_tuning_takes_is_what_it_will_say() -> None:
    text = " ".join((readme.ROOT / "README.md").read_text().split())
    low, medium = (round(cost_in_runs(8, effort), -1) for effort in ("low", "medium"))
    assert f"of about {low:.0f} videos with `--effort low`, and of {medium:.0f} with `medium`" in text
